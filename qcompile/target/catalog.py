"""The targets that are delivered (measured: fact sheet C2-C5 for TensorRT, A2 for ONNX Runtime)."""

from __future__ import annotations

from qcompile.quant.qtype import FLOAT4E2M1, FLOAT8E4M3FN, INT4, INT8, UINT8
from qcompile.target.target import OpRule, Target

_TENSORRT_SCHEMES = ("w8a8", "fp16", "bf16", "fp8", "w4a16", "nvfp4", "mxfp8", "w6a6", "w4a8", "w4a4")
_ORT_SCHEMES = ("w8a8", "fp16", "w6a6", "w4a8", "w4a4", "w4a16")
_INTEGER_SCHEMES = ("w8a8", "w6a6", "w4a8", "w4a4")
_CAPABILITIES = ((INT8.name, 75), (INT4.name, 80), ("bfloat16", 80), (FLOAT8E4M3FN.name, 89))  # and fp4: Blackwell
_LOW = (INT8, FLOAT8E4M3FN, FLOAT4E2M1)

_OPS = (OpRule("Conv", 0), OpRule("ConvTranspose", 1, low_kernel=False), OpRule("MatMul", "last"), OpRule("Gemm", "trans_b"))


_MXFP8 = (
    "TensorRT-RTX 1.7 dequantizes MXFP8 operands and multiplies in float: a smaller file, no faster engine;"
    " --scheme fp8 and nvfp4 are multiplied in 8 and 4 bit"
)


def _tensorrt(name: str, title: str, fp4: int, gpus: tuple[str, ...] = (), caveats: tuple[tuple[str, str], ...] = ()) -> Target:
    return Target(
        name,
        title,
        _TENSORRT_SCHEMES,
        half_body=True,
        symmetric=True,
        min_opset=13,
        max_opset=25,
        activations=_LOW,
        weights=(*_LOW, INT4),
        ops=_OPS,
        capabilities=(*_CAPABILITIES, (FLOAT4E2M1.name, fp4)),
        gpus=gpus,
        caveats=caveats,
        one_quantizer=True,
    )


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        _tensorrt("trt", "TensorRT 10.12+ and 11, strongly typed", fp4=100),
        _tensorrt(
            "rtx",
            "TensorRT for RTX",
            fp4=120,
            gpus=("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
            caveats=(("mxfp8", _MXFP8),),
        ),
        Target(
            "ort",
            "ONNX Runtime, CPU and CUDA providers",
            _ORT_SCHEMES,
            half_body=False,
            symmetric=False,
            min_opset=13,
            max_opset=26,
            activations=(UINT8, INT8),
            weights=(INT8, UINT8, INT4),
            ops=_OPS,
            bias_float=False,
        ),
        Target(
            "integer",
            "integers only: standard ONNX operators, no floating point between the first Q and the last DQ",
            _INTEGER_SCHEMES,
            half_body=False,
            symmetric=False,
            min_opset=21,
            max_opset=26,
            activations=(INT8,),
            weights=(INT8,),
            ops=_OPS,
            bias_float=False,
        ),
    )
}
