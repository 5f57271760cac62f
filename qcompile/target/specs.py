"""The specs that placements give to weights and activations, and which weights get none."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.ir.ops import const_value, is_op, output_channel_axis
from qcompile.quant.qtype import UINT8, QType, simulated_int
from qcompile.quant.spec import Granularity, PerAxis, PerBlock, QuantSpec, Scheme
from qcompile.target.target import Request


def weight_spec(node: ir.Node, slot: int, scheme: Scheme) -> QuantSpec:
    """Symmetric, per output channel; blocks along the reduction axis where the scheme says so."""
    assert scheme.weight is not None
    axis = output_channel_axis(node)
    granularity: Granularity = PerAxis(axis)
    if scheme.block_size is not None and node.op_type in ("MatMul", "Gemm"):
        granularity = PerBlock(1 - axis, scheme.block_size)
    return QuantSpec(scheme.weight, granularity)


def activation_spec(request: Request) -> QuantSpec:
    """Per tensor: signed and symmetric where zero points must be 0, else unsigned with a zero point."""
    qtype = request.scheme.fallback or request.scheme.activation
    assert qtype is not None
    if request.target.symmetric or qtype.family == "float":
        return QuantSpec(qtype)
    return QuantSpec(unsigned(qtype), symmetric=False)


def unsigned(qtype: QType) -> QType:
    """The unsigned integer of the same width."""
    return UINT8 if qtype.bits == 8 else simulated_int(qtype.bits, signed=False)


def unfit_for_cpu(node: ir.Node, slot: int, deconvolution: str) -> str | None:
    """Why integer kernels for CPUs cannot take the weight in `slot`, or None; `deconvolution` is what a ConvTranspose is told."""
    weight = const_value(node.inputs[slot])
    if is_op(node, "ConvTranspose"):
        return deconvolution
    if weight is None or weight.dtype != ir.DataType.FLOAT:
        return "its weight is not float32"
    if is_op(node, "MatMul") and (slot != 1 or len(weight.shape) != 2):
        return "its constant operand is not a 2-D right-hand weight"
    return None
