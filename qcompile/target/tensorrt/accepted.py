"""Documented non-rules: forms that people ask about and that no rule reports, because the builder does what they say.

Each name is a row of the behaviour matrix in `tests/target/matrix.py`, where TensorRT-RTX builds it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accepted:
    """A form, what TensorRT-RTX makes of it, and why there is no rule."""

    name: str
    outcome: str
    reason: str


ACCEPTED: tuple[Accepted, ...] = (
    Accepted("conv per tensor", "int8", "one scale for the whole weight is legal; per channel is only more accurate"),
    Accepted("conv depthwise", "int8", "depthwise and grouped convolutions have int8 kernels, odd channel counts too"),
    Accepted("conv depthwise fp8", "fp8", "fp8 kernels exist for depthwise convolutions, on sm89 and sm120"),
    Accepted("conv fp8", "fp8", "per-channel fp8 weights run as fp8 (older full TensorRT refused them)"),
    Accepted("conv fp8 per tensor", "fp8", "per-tensor fp8 weights run as fp8"),
    Accepted("conv fp8 1x32", "fp8", "up to 32 taps have fp8 kernels"),
    Accepted(
        "conv one input channel", "int8", "the builder pads few input channels: int8 runs, its gain is not known without a GPU"
    ),
    Accepted("conv float weight with Q", "int8", "a float weight with its own Q/DQ is quantized at build time"),
    Accepted("conv no zero point", "int8", "the zero point may be omitted if output_dtype says the type (opset 21)"),
    Accepted("conv opset 23", "int8", "opsets 19 to 25 are documented and build"),
    Accepted("conv opset 25", "int8", "opsets 19 to 25 are documented and build"),
    Accepted("conv float32 opset 13", "int8", "int8 with float32 scales is ONNX since opset 10"),
    Accepted("matmul transposed weight", "int8", "a constant Transpose behind the weight's DequantizeLinear is folded"),
    Accepted("matmul weight on the left", "int8", "W @ x: the scales run along the rows of W"),
    Accepted(
        "matmul 1x1", "int8", "matrices down to one row or column are padded and run as int8; speed is not known without a GPU"
    ),
    Accepted("matmul fp8 3x5", "fp8", "small and odd sizes run as fp8 too"),
    Accepted("matmul bfloat16", "int8", "bfloat16 scales in a bfloat16 network behave as float16 ones do"),
    Accepted("matmul sm75", "int8", "int8 GEMMs exist for sm75 (convolutions do not: QC-TRT-034)"),
    Accepted("int8 by int4", "int8", "per-channel int4 weights are unpacked in front of an int8 GEMM"),
    Accepted("int4 blocks", "packed int4", "weight-only: the GEMM reads packed int4 and multiplies in float16"),
    Accepted("int4 blocks of 16", "packed int4", "full TensorRT documents 64 and 128 only; RTX takes 8 to K/2"),
    Accepted("int4 blocks along N", "packed int4", "blocks along the output channels stay packed as well"),
    Accepted("nvfp4", "fp4", "trt::TRT_FP4DynamicQuantize and two DequantizeLinear for the weight, sm120"),
    Accepted("concat equal scales", "int8", "Q/DQ with one scale passes through a Concat"),
    Accepted("concat unequal scales, Q behind", "int8", "a Q/DQ behind the Concat sets the scale that the convolution reads"),
    Accepted("residual float", "int8", "a float skip connection leaves the convolutions in int8"),
    Accepted("residual shared", "int8", "the skip reads the consumer's DequantizeLinear: less traffic"),
    Accepted("residual own", "int8", "Q/DQ on both inputs of the Add: one rounding more, no int8 compute more"),
    Accepted("between Transpose", "int8", "Q/DQ commutes with data movement"),
    Accepted("between Relu", "int8", "the pointwise kernel requantizes"),
    Accepted("between Softmax", "int8", "runs as a half pointwise kernel between two quantizers: saves bandwidth only"),
    Accepted("between MaxPool", "int8", "MaxPool stays on int8 codes"),
    Accepted("between AveragePool", "int8", "runs in half between two quantizers: saves bandwidth only"),
)
