"""Where branches meet: residual adds read the consumer's DQ, the inputs of a Concat share its range (TensorRT)."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from qcompile.decide.placement import Placement, Point
from qcompile.ir.ops import is_const, is_op
from qcompile.quant.spec import PerTensor
from qcompile.target.target import Request

_FLOAT_SKIP = "its skip connection stays in float, which is more accurate (annotate{residual=shared} reads the convolution's DQ)"


def share_residuals(out: Placement, graph: ir.Graph, request: Request) -> None:
    """x -> Q -> DQ -> {Conv, Add}: only the codes of x are stored, and the Add reads them.

    Measured: the fused kernel reads the skip as Int8 instead of Half, which costs 0.2 to 0.4 points of top-1
    (ResNet-20 90.92 -> 90.72, a hybrid ViT 81.80 -> 81.40); so it is on request.
    """
    read, shared = _activations(out, "Conv"), request.choices.residual == "shared"
    for add in graph:
        if not is_op(add, "Add") or any(v is None or is_const(v) for v in add.inputs):
            continue
        leaders = {i: read[v] for i, v in enumerate(add.inputs) if v is not None and v in read}
        if not leaders:
            continue
        reason = request.selection.excluded(add) or (None if shared or request.selection.forced(add) else _FLOAT_SKIP)
        if reason:
            out.miss(add, reason)
            continue
        for slot, leader in leaders.items():
            out.follow(add, slot, leader)


def share_concat_ranges(out: Placement, graph: ir.Graph) -> None:
    """A tensor that is quantized for a reader of its own and, concatenated, for another takes the range of the Concat if that is
    about as wide: then the codes are joined.  Else it is joined in float and has codes of its own."""
    read = _activations(out)
    wider: dict[ir.Value, ir.Value] = {}
    for concat in graph:
        if not is_op(concat, "Concat") or concat.outputs[0] not in read:
            continue
        for value in concat.inputs:
            if value is not None and value in read:
                wider[value] = concat.outputs[0]
    out.points[:] = [replace(s, joined=wider[s.value]) if s.value in wider else s for s in out.points]


def _activations(out: Placement, *op_types: str) -> dict[ir.Value, Point]:
    """The first use of each tensor that is quantized per tensor over a measured range (by one of `op_types` if given)."""
    found: dict[ir.Value, Point] = {}
    for point in out.points:
        fits = not point.is_weight and point.slot >= 0 and isinstance(point.spec.granularity, PerTensor) and point.bounds is None
        if fits and (not op_types or is_op(point.node, *op_types)):
            found.setdefault(point.value, point)
    return found
