"""What depends on the GPU, and what TensorRT for RTX lacks."""

from __future__ import annotations

from onnx import TensorProto

from qcompile.target.findings import Context, Hits
from qcompile.target.tensorrt.types import FLOATS

AMPERE = 80


def gpu_types(c: Context) -> Hits:
    """A code type without kernels on one of the GPUs, or a GPU that the backend cannot compile for."""
    read = (o.type_name for site in c.sites for o in site.operands)
    body = (FLOATS.get(t) for t in set(c.view.elem_types.values()))
    kinds = {k for k in (*map(c.code_type, c.quantizers), *read, *body) if k is not None}
    for gpu in c.gpus:
        if c.target.gpus and gpu not in c.target.gpus:
            yield "", f"{c.target.name} cannot compile for {gpu} (it has {', '.join(c.target.gpus)})"
            continue
        number = gpu_number(gpu)
        for kind in sorted(kinds):
            if number and number < c.target.capability(kind):
                yield "", f"{kind} needs sm{c.target.capability(kind)} or newer, {gpu} has no such kernels"


def turing_convolution(c: Context) -> Hits:
    """TensorRT-RTX compiles int8 convolutions for sm75 to float kernels (its int8 GEMMs are there)."""
    old = _old(c)
    for site in c.sites if old else []:
        if site.node.op_type == "Conv" and len(site.operands) == 2:
            yield site.node.name, f"{c.target.name} has no int8 convolution for {', '.join(old)}: this runs in float"


def turing_float_gemm(c: Context) -> Hits:
    """TensorRT-RTX has no float32 GEMM for sm75 (nor does it take the int8 GEMM of a float32 network)."""
    old = _old(c)
    for node in c.view.of_type("MatMul", "Gemm") if old else []:
        if _type(c, node.input[0]) == TensorProto.FLOAT:
            yield node.name, f"{c.target.name} has no float32 GEMM for {', '.join(old)}"


def bfloat16_deconvolution(c: Context) -> Hits:
    """TensorRT-RTX has no ConvTranspose in bfloat16."""
    for node in c.view.of_type("ConvTranspose") if c.target.gpus else []:
        if any(_type(c, name) == TensorProto.BFLOAT16 for name in node.input[:2]):
            yield node.name, f"{c.target.name} has no ConvTranspose in bfloat16"


def _type(c: Context, name: str) -> int:
    """The element type of `name`; behind a DequantizeLinear its scale's type (before opset 19 ONNX says float32)."""
    dq = c.view.dequantizer(name)
    return c.view.elem_types.get(name if dq is None or dq.op_type != "DequantizeLinear" else dq.input[1], 0)


def _old(c: Context) -> list[str]:
    """The GPUs below sm80 for which an RTX engine is wanted."""
    return [g for g in c.gpus if c.target.gpus and 0 < gpu_number(g) < AMPERE]


def gpu_number(gpu: str) -> int:
    """`sm89` -> 89; 0 when it has another form."""
    digits = gpu.removeprefix("sm")
    return int(digits) if digits.isdigit() else 0
