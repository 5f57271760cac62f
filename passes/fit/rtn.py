"""rtn: weight scales, with a search for the clipping range."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe import Moments, Probe, Rows
from qcompile.decide.decisions import Use, decision, quantizers, replace
from qcompile.decide.storable import refuse_unstorable
from qcompile.ir.model import Model
from qcompile.ir.ops import activation_channel_axis, const_array, input_channel_axis
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult, Stage
from qcompile.quant.affine import fake_quant, qparams_from_range
from qcompile.quant.blockformats import block_format
from qcompile.quant.ranges import weight_mse_scale
from qcompile.quant.spec import PerAxis, PerBlock, PerTensor, QParams, QuantSpec

_ROWS = 256


@dataclass(frozen=True)
class RoundToNearest(Pass):
    """Round weights to the nearest code; below 8 bit, clip each channel where the layer's output error is least.

    scale_c = max |W_c| / qmax (min-max), or argmin_s sum_k E[x_k^2] (W_ck - Q_s(W_ck))^2 over s <= max|W_c| / qmax.
    NVFP4 searches each block's E4M3 scale from 0.7 to 1.6 of min-max's; MXFP8's are the powers of two that cover.
    before: a decision without a scale     after: the decision with its scale; the weight itself is rounded at insert-qdq
    The searched scale is kept only where the layer's output error on calibration rows is not above min-max's.
    """

    name = "rtn"
    kind = Kind.FIT
    needs = Stage.DECIDED
    reaches = Stage.FITTED
    clip: Annotated[Literal["auto", "search", "none"], "clipping: search below 8 bit (auto), always or never"] = "auto"

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """Input energies, and input rows for the contract, of the layers whose clipping is searched."""
        for node, slot, quantizer in (use for uses in _weights(model.graph) for use in uses):
            data = _data(node, slot)
            if self._searches(quantizer.spec) and data is not None:
                yield Moments(activation_channel_axis(node)).of(data)
                if node.op_type in ("MatMul", "Gemm"):
                    yield Rows(_ROWS).of(data)

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Set the scale of every weight decision."""
        unknown = [uses for uses in _weights(model.graph) if uses[0].quantizer.qparams is None]
        for uses in unknown:
            replace(uses, uses[0].quantizer.with_qparams(_floored(uses[0].node, self._fit(uses[0], ctx), ctx)))
        refuse_unstorable(model.graph, ctx.target.body(ctx.scheme), ctx.remarks)
        return PassResult(bool(unknown))

    def _searches(self, spec: QuantSpec) -> bool:
        form = block_format(spec)
        if form is not None and form.search is None:
            return False
        return self.clip == "search" or (self.clip == "auto" and spec.qtype.bits < 8)

    def _fit(self, use: Use, ctx: PassContext) -> QParams:
        (node, slot, quantizer), tensor = use, use.value.const_value
        assert tensor is not None
        weight = tensor.numpy().astype(np.float32)
        plain = minmax_qparams(weight, quantizer.spec)
        if not self._searches(quantizer.spec):
            ctx.remarks.applied(str(node.name), "min-max weight scales")
            return plain
        searched = self._search(node, slot, weight, quantizer.spec, ctx)
        gain = _gain_db(node, slot, weight, plain, searched, quantizer.spec, ctx)
        if gain < 0:
            ctx.remarks.missed(
                str(node.name), "the clip search would raise the layer's output error; min-max kept", gain_db=round(gain, 2)
            )
            return plain
        ctx.remarks.applied(str(node.name), "weight clipping searched", gain_db=round(gain, 2))
        return searched

    def _search(self, node: ir.Node, slot: int, weight: NDArray[np.float32], spec: QuantSpec, ctx: PassContext) -> QParams:
        energy = _energy(node, slot, weight, ctx)
        form = block_format(spec)
        if form is not None and form.search is not None and isinstance(spec.granularity, PerBlock):
            return form.search(weight, spec.granularity.axis, energy)
        scale = weight_mse_scale(weight, spec.qtype, spec.granularity, energy)
        return QParams(scale, np.zeros(scale.shape, np.int64))


def _floored(node: ir.Node, params: QParams, ctx: PassContext) -> QParams:
    """Scales large enough that ONNX Runtime's int32 bias, c / (s_x s_w), cannot overflow on nearly dead channels.

    The floor |c| / (s_x 2^29) bites only where the weights add less than a 10,000th of the bias.
    """
    data = decision(node, 0)
    bias = const_array(node.inputs[2]) if len(node.inputs) > 2 else None
    if data is None or data.qparams is None or bias is None or bias.shape != params.scale.shape:
        return params
    floor = np.abs(bias.astype(np.float64)) / (float(data.qparams.scale) * 2.0**29)
    if np.any(floor > params.scale):
        ctx.remarks.note(
            str(node.name),
            f"{int((floor > params.scale).sum())} nearly dead channels: weight scale raised to keep an int32 bias exact",
        )
    return QParams(np.maximum(params.scale, floor), params.zero_point)


def _weights(graph: ir.Graph) -> list[list[Use]]:
    return [uses for uses in quantizers(graph) if uses[0].is_weight]


def _data(node: ir.Node, slot: int) -> ir.Value | None:
    """The activation that meets the weight at `slot`."""
    return node.inputs[1 - slot] if node.op_type in ("MatMul", "Gemm") else node.inputs[0]


def minmax_qparams(weight: NDArray[np.float32], spec: QuantSpec) -> QParams:
    """Largest magnitude of each slice of the granularity over qmax, in a scale of the block format; zero point 0."""
    form = block_format(spec)
    if form is not None and isinstance(spec.granularity, PerBlock):
        return form.weight(weight, spec.granularity.axis)
    match spec.granularity:
        case PerTensor():
            top = np.asarray(np.abs(weight).max())
        case PerAxis(axis):
            top = np.abs(weight).max(tuple(i for i in range(weight.ndim) if i != axis))
        case PerBlock(axis, size):
            starts = np.arange(0, weight.shape[axis], size)
            top = np.maximum.reduceat(np.abs(weight), starts, axis=axis)
    return qparams_from_range(-top.astype(np.float64), top.astype(np.float64), spec.qtype, True)


def _energy(node: ir.Node, slot: int, weight: NDArray[Any], ctx: PassContext) -> NDArray[np.float64] | None:
    """E[x_k^2] along the weight's input axis, shaped to broadcast; None for grouped convolutions."""
    data = _data(node, slot)
    stat = ctx.told.get(Moments(activation_channel_axis(node)).of(data)) if data is not None else None
    axis = input_channel_axis(node)
    if stat is None or stat.sumsq.size != weight.shape[axis]:
        return None
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    return (stat.sumsq / max(stat.count, 1) + 1e-12).reshape(shape)


def _gain_db(
    node: ir.Node, slot: int, w: NDArray[np.float32], plain: QParams, searched: QParams, spec: QuantSpec, ctx: PassContext
) -> float:
    """How much lower the output error on calibration rows is with `searched` (weight error where rows do not apply)."""
    a, b = (fake_quant(w, p, spec.qtype, spec.granularity) - w for p in (plain, searched))
    data = _data(node, slot)
    stat = ctx.told.get(Rows(_ROWS).of(data)) if data is not None else None
    if stat is not None and len(stat.rows) and slot == 1:
        transposed = input_channel_axis(node) == 1
        a, b = (stat.rows.astype(np.float32) @ (d.T if transposed else d) for d in (a, b))
    before, after = float(np.square(a, dtype=np.float64).sum()), float(np.square(b, dtype=np.float64).sum())
    return 10 * float(np.log10((before + 1e-30) / (after + 1e-30)))
