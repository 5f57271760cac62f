"""The behaviour matrix: each form, the rules it breaks, and what the TensorRT-RTX builder makes of it.

`outcome`: "low" (a low-precision kernel), "packed" (a float GEMM that reads packed int4), "float" (builds, float kernel),
"refused" (no engine).  Used twice: by the rule tests, and by the audit tests, which build every row and so prove that
checker and compiler agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import onnx
from onnx import TensorProto

from tests.target import formats
from tests.target.graphs import AttentionForm, Form, single

Outcome = Literal["low", "packed", "float", "refused"]


@dataclass(frozen=True)
class Row:
    """One graph; `low` names the type its kernels read where the outcome is "low"."""

    name: str
    model: Callable[[], onnx.ModelProto]
    outcome: Outcome
    rules: frozenset[str] = frozenset()
    gpu: str = "sm89"
    low: str = "int8"


@dataclass(frozen=True)
class AttentionRow:
    """One attention block; `low` counts its products in low-precision kernels, of two."""

    name: str
    form: AttentionForm
    fused: bool
    low: int
    rules: frozenset[str] = frozenset()


def graph(
    name: str, model: Callable[[], onnx.ModelProto], outcome: Outcome, *numbers: int, gpu: str = "sm89", low: str = "int8"
) -> Row:
    return Row(name, model, outcome, frozenset(f"QC-TRT-{n:03d}" for n in numbers), gpu, low)


def row(name: str, form: Form, outcome: Outcome, *numbers: int, gpu: str = "sm89", low: str = "") -> Row:
    kind = low or ("float8e4m3fn" if form.activation == "float8e4m3fn" else "int8")
    return graph(name, lambda: single(form), outcome, *numbers, gpu=gpu, low=kind)


CONV, MATMUL, GEMM, DECONV = Form(), Form(op="MatMul"), Form(op="Gemm"), Form(op="ConvTranspose")
FP8 = {"activation": "float8e4m3fn", "weight": "float8e4m3fn"}
INT4 = {"activation": None, "weight": "int4"}
FLOAT, BF16 = TensorProto.FLOAT, TensorProto.BFLOAT16
IN_FLOAT = {"scale_type": FLOAT, "body": FLOAT}

CONVOLUTIONS = [
    row("conv", CONV, "low"),
    row("conv sm80", CONV, "low", gpu="sm80"),
    row("conv sm86", CONV, "low", gpu="sm86"),
    row("conv sm120", CONV, "low", gpu="sm120"),
    row("conv sm75", CONV, "float", 34, gpu="sm75"),  # convolutions only: GEMMs do run (below)
    row("conv per tensor", CONV.but(per_channel=False), "low"),
    row("conv axis 1", CONV.but(weight_axis=1), "float", 7),
    row("conv activation per channel", CONV.but(activation_axis=1), "float", 8),
    row("conv activation per row", CONV.but(activation_axis=2), "float", 8),
    row("conv activation scale of one element", CONV.but(activation_axis=0), "float", 38),
    row("conv weight scale of one element", CONV.but(one_scale=True), "refused", 44),
    row("conv activation only", CONV.but(weight=None), "float", 9),
    row("conv weight only", CONV.but(activation=None), "float", 22),
    row("conv depthwise", CONV.but(groups=32), "low"),
    row("conv depthwise fp8", CONV.but(groups=32, **FP8), "low"),
    row("conv depthwise fp8 sm120", CONV.but(groups=32, **FP8), "low", gpu="sm120"),
    row("conv grouped", CONV.but(groups=4), "low"),
    row("conv one input channel", CONV.but(x_dims=(1, 1, 8, 8), w_dims=(32, 1, 3, 3)), "low"),
    row("conv fp8", CONV.but(**FP8), "low"),
    row("conv fp8 per tensor", CONV.but(per_channel=False, **FP8), "low"),
    row("conv fp8 sm120", CONV.but(**FP8), "low", gpu="sm120"),
    row("conv fp8 1x32", CONV.but(x_dims=(1, 8, 8, 40), w_dims=(32, 8, 1, 32), **FP8), "low"),
    row("conv fp8 1x33", CONV.but(x_dims=(1, 8, 8, 40), w_dims=(32, 8, 1, 33), **FP8), "float", 33),
    row("conv fp8 6x6", CONV.but(w_dims=(32, 32, 6, 6), **FP8), "float", 33),
    row("conv float weight with Q", CONV.but(weight_q=True), "low"),
    row("conv no zero point", CONV.but(explicit_zero_point=False), "low"),
    row("conv opset 13", CONV.but(opset=13), "low", 17),  # not valid ONNX (float16 scales), but it builds
    row("conv opset 23", CONV.but(opset=23), "low"),
    row("conv opset 25", CONV.but(opset=25), "low"),
    row("conv opset 27", CONV.but(opset=27), "low", 26),
    row("conv float32 opset 13", CONV.but(opset=13, **IN_FLOAT), "low", 20),
    row("deconvolution", DECONV, "float", 19),
    row("deconvolution axis 0", DECONV.but(weight_axis=0), "float", 7, 19),
    row("deconvolution per tensor", DECONV.but(per_channel=False), "float", 19),
    row("deconvolution fp8", DECONV.but(**FP8), "float", 19),
]

GEMMS = [
    row("matmul", MATMUL, "low"),
    row("matmul sm75", MATMUL, "low", gpu="sm75"),  # unlike convolutions (above)
    row("matmul sm120", MATMUL, "low", gpu="sm120"),
    row("matmul float32 sm75", MATMUL.but(activation=None, weight=None, **IN_FLOAT), "refused", 45, gpu="sm75"),
    row("matmul bfloat16 sm75", MATMUL.but(body=BF16, scale_type=BF16), "refused", 21, gpu="sm75"),
    row("matmul opset 19", MATMUL.but(opset=19), "low"),
    row("matmul opset 26", MATMUL.but(opset=26), "low", 26),
    row("matmul axis 0", MATMUL.but(weight_axis=0), "float", 7),
    row("matmul transposed weight", MATMUL.but(transposed_weight=True, weight_axis=0), "low"),
    row("matmul transposed weight axis 1", MATMUL.but(transposed_weight=True, weight_axis=1), "float", 7),
    row("matmul weight on the left", MATMUL.but(left=True, weight_axis=0), "low"),
    row("matmul weight on the left axis 1", MATMUL.but(left=True, weight_axis=1), "float", 7),
    row("matmul activation per row", MATMUL.but(activation_axis=0), "low", 31),
    row("matmul activation per column", MATMUL.but(activation_axis=1), "float", 8),
    row("matmul weight only", MATMUL.but(activation=None), "float", 22),
    row("matmul activation only", MATMUL.but(weight=None), "float", 9),
    row("matmul bfloat16", MATMUL.but(body=BF16, scale_type=BF16), "low"),
    row("matmul 1x1", MATMUL.but(size=(1, 1)), "low"),
    row("matmul 15x17", MATMUL.but(size=(15, 17)), "low"),
    row("matmul fp8 3x5", MATMUL.but(size=(3, 5), **FP8), "low"),
    row("matmul fp8", MATMUL.but(**FP8), "low"),
    row("matmul fp8 per tensor", MATMUL.but(per_channel=False, **FP8), "low"),
    row("matmul fp8 sm120", MATMUL.but(**FP8), "low", gpu="sm120"),
    row("matmul fp8 sm86", MATMUL.but(**FP8), "refused", 21, gpu="sm86"),
    row("matmul fp8 sm75", MATMUL.but(**FP8), "refused", 21, gpu="sm75"),
    row("matmul fp8 weight only", MATMUL.but(activation=None, weight="float8e4m3fn"), "float", 22),
    row("gemm", GEMM, "low"),
    row("gemm transB", GEMM.but(trans_b=True), "low"),
    row("gemm transB axis 1", GEMM.but(trans_b=True, weight_axis=1), "float", 7),
    row("int8 by fp8", MATMUL.but(weight="float8e4m3fn"), "refused", 10),
    row("int8 by fp8 conv", CONV.but(weight="float8e4m3fn"), "refused", 10),
    row("int8 by int4", MATMUL.but(weight="int4"), "low"),
    row("int8 by int4 conv", CONV.but(weight="int4"), "refused", 10),
    row("int8 by int4 per tensor", MATMUL.but(weight="int4", per_channel=False), "refused", 10),
    row("int8 by int4 blocks", MATMUL.but(weight="int4", block=32), "low", 27),  # builds; the scales are applied wrongly
    row("int8 by int8 blocks", MATMUL.but(block=32), "low", 27),
    row("int4 by int4", MATMUL.but(activation="int4", weight="int4"), "low", 35, low="int4"),
]

VALUES = [
    row("deconvolution bfloat16", DECONV.but(body=BF16, scale_type=BF16), "refused", 19, 46),
    row("deconvolution int4 by int4", DECONV.but(activation="int4", weight="int4"), "refused", 10, 19, 35),
    row("int4 odd size", MATMUL.but(size=(7, 5), **INT4), "refused", 23, 47),
    row(
        "int4 activation of odd size",
        CONV.but(activation="int4", weight=None, x_dims=(1, 3, 9, 9), w_dims=(8, 3, 3, 3)),
        "refused",
        9,
        35,
        47,
    ),
    row("uint8 by output_dtype", CONV.but(activation="uint8", explicit_zero_point=False), "refused", 2),
    row("types differ, scale of one element", CONV.but(weight="int4", activation_axis=0), "float", 38),
    row("zero point", CONV.but(zero_point=3), "refused", 1),
    row("fp8 zero point", MATMUL.but(zero_point=1, **FP8), "low", 48),  # accepted; what it does is not known
    row("uint8 zero point 128", CONV.but(activation="uint8", zero_point=128), "refused", 1, 41),
    row("uint8 activation", CONV.but(activation="uint8"), "low", 41),  # builds; codes above 127 have no established meaning
    row("uint8 weight", CONV.but(weight="uint8"), "refused", 2),
    row("uint4 weight", MATMUL.but(activation=None, weight="uint4", block=32), "refused", 2),
    row("int16", CONV.but(activation="int16", weight="int16"), "refused", 2),
    row("uint16", CONV.but(activation="uint16", weight="uint16"), "refused", 2),
    row("fp8 e5m2", CONV.but(activation="float8e5m2", weight="float8e5m2"), "refused", 2),
    row("int32 bias", CONV.but(int32_bias=True), "refused", 3),
    row("computed scale", CONV.but(computed_scale=True), "refused", 4),  # the builder crashes
    row("scale 0", CONV.but(scale=0.0), "refused", 5),
    row("scale negative", CONV.but(scale=-0.1), "refused", 5),
    row("scale infinite", MATMUL.but(scale=float("inf")), "low", 42),
    row("float32 scales and body", CONV.but(**IN_FLOAT), "low", 20),
    row("float32 scales, float16 body", MATMUL.but(scale_type=FLOAT), "low", 6),
    row("float32 scales, float16 bias", CONV.but(scale_type=FLOAT), "refused", 6, 30),
    row("float32 scales, bfloat16 bias", CONV.but(scale_type=FLOAT, body=BF16), "refused", 6, 30),
]

BLOCKS = [
    row("int4 blocks", MATMUL.but(block=32, **INT4), "packed"),
    row("int4 blocks of 16", MATMUL.but(block=16, **INT4), "packed"),
    row("int4 blocks of 64", MATMUL.but(block=64, size=(128, 32), **INT4), "packed"),
    row("int4 blocks of 128", MATMUL.but(block=128, size=(256, 32), **INT4), "packed"),
    row("int4 blocks along N", MATMUL.but(block=16, block_axis=1, **INT4), "packed"),
    row("int4 blocks gemm transB", GEMM.but(block=32, trans_b=True, block_axis=1, **INT4), "packed"),
    row("int4 blocks opset 19", MATMUL.but(block=32, opset=19, **INT4), "packed", 17),
    row("int4 blocks sm75", MATMUL.but(block=32, **INT4), "refused", 21, gpu="sm75"),
    row("int4 blocks conv", CONV.but(block=16, block_axis=1, **INT4), "refused", 28),
    row("int4 blocks not dividing", MATMUL.but(block=32, size=(80, 32), **INT4), "refused", 28),
    row("int4 blocks cut differently", MATMUL.but(block=64, size=(96, 32), **INT4), "packed", 43),  # 64 + 32 becomes 48 + 48
    row("int4 one block", MATMUL.but(block=64, **INT4), "float", 39),
    row("int4 per channel", MATMUL.but(**INT4), "float", 23),
    row("int4 per tensor", MATMUL.but(per_channel=False, **INT4), "float", 23),
    row("int8 blocks", MATMUL.but(activation=None, block=32), "float", 22, 23),
    graph("nvfp4", formats.nvfp4, "low", gpu="sm120", low="float4e2m1"),
    graph("nvfp4 opset 21", lambda: formats.nvfp4(opset=21), "low", 17, gpu="sm120", low="float4e2m1"),
    graph("nvfp4 sm89", formats.nvfp4, "refused", 21),
    graph("nvfp4 blocks along N", lambda: formats.nvfp4(axis=1), "float", 36, gpu="sm120"),
    graph("nvfp4 blocks of 32", lambda: formats.nvfp4(block=32), "refused", 36, 37, gpu="sm120"),
    graph("nvfp4 K 40", lambda: formats.nvfp4(k=40), "refused", 28, 37, gpu="sm120"),
    graph("nvfp4 K 16", lambda: formats.nvfp4(k=16), "float", 36, gpu="sm120"),
    graph("nvfp4 weight only", lambda: formats.nvfp4(dynamic=False), "float", 22, gpu="sm120"),
    graph("mxfp8", formats.mxfp8, "float", 29, gpu="sm120"),
    graph("mxfp8 sm86", formats.mxfp8, "refused", 21, 29, gpu="sm86"),
]

PLACEMENT = [
    graph("concat equal scales", lambda: formats.concatenated(outer=False), "low"),
    graph("concat unequal scales", lambda: formats.concatenated((0.05, 0.2), outer=False), "float", 32),
    graph("concat unequal scales, Q behind", lambda: formats.concatenated((0.05, 0.2)), "low"),
    graph("duplicate quantizers, equal", formats.two_quantizers, "low", 40),
    graph("duplicate quantizers, unequal", lambda: formats.two_quantizers((0.05, 0.2)), "low", 11),
    graph("codes transposed before the DQ", formats.loose_codes, "refused", 24),
    *(graph(f"residual {skip}", lambda skip=skip: formats.residual(skip), "low") for skip in ("float", "shared", "own")),
    *(graph(f"between {op}", lambda op=op: formats.between(op), "low") for op in ("Transpose", "Relu", "Softmax", "Sigmoid")),
    *(graph(f"between {op}", lambda op=op: formats.pooled(op), "low") for op in ("MaxPool", "AveragePool")),
]

SINGLE = [*CONVOLUTIONS, *GEMMS, *VALUES, *BLOCKS, *PLACEMENT]


def block(name: str, form: AttentionForm, fused: bool, low: int, *numbers: int) -> AttentionRow:
    return AttentionRow(name, form, fused, low, frozenset(f"QC-TRT-{n:03d}" for n in numbers))


ATTENTION = [
    block("all four", AttentionForm(), True, 2),
    block("all four fp8", AttentionForm(kind="float8e4m3fn", softmax_scale=1 / 448), True, 2),
    block("none", AttentionForm(frozenset()), True, 0),
    block("q and k", AttentionForm(frozenset("qk")), False, 1, 13),
    block("softmax and v", AttentionForm(frozenset({"softmax", "v"})), False, 1, 13),
    block("only v", AttentionForm(frozenset("v")), True, 0, 13),
    block("scores too", AttentionForm(scores=True), False, 2, 12),
    block("scale before the Q", AttentionForm(scale_at="q"), True, 2),
    block("k transposed behind its DQ", AttentionForm(late_transpose=True), True, 2),
    block("additive mask", AttentionForm(mask=True), True, 2),
    block("packed", AttentionForm(packed=True), True, 2, 18),
    block("wide softmax scale", AttentionForm(softmax_scale=0.05), True, 2, 25),
]
