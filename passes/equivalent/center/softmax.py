"""Probabilities moved by a constant, undone behind the product with V: P V = (P - p0) V + p0 sum_keys V."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.calib.observe import MinMax, MinMaxStat, Probe
from qcompile.calib.observe.change import Changes
from qcompile.ir.edit import add_constant, insert_after, new_node, redirect, splice_after
from qcompile.ir.model import Model
from qcompile.ir.notes import keep_float
from qcompile.passes.equivalent.center.shift import PAYS, centre
from qcompile.pipeline.base import PassContext
from qcompile.structure import Attention, find_attentions
from qcompile.structure.scores import Values

_AXES_AS_INPUT = 13


@dataclass(frozen=True)
class Probabilities:
    """Centre the probabilities (`softmax`)."""

    softmax: bool

    def probes(self, model: Model) -> Iterator[Probe]:
        """Extremes of the probabilities."""
        yield from (_probability_probe(a) for a in self._attentions(model))

    def apply(self, model: Model, ctx: PassContext, changes: Changes) -> bool:
        """Every attention whose probabilities are off centre."""
        done = [_centred(model.graph, a, ctx, changes) for a in list(self._attentions(model))]
        return any(done)

    def _attentions(self, model: Model) -> Iterator[Attention]:
        yield from find_attentions(model.graph) if self.softmax else ()


def _centred(graph: ir.Graph, a: Attention, ctx: PassContext, changes: Changes) -> bool:
    reason, stat = ctx.selection.any_excluded((a.softmax, a.pv)), ctx.told[_probability_probe(a)]
    t, before, after = centre(stat.lo, stat.hi)
    if reason or after > PAYS * before:
        ctx.remarks.missed(str(a.softmax.name), reason or "probabilities are centred already", largest=before, centred=after)
        return False
    changes.move([str(a.pv.outputs[0].name)])
    centre_probabilities(graph, a.values, float(t))
    ctx.remarks.applied(str(a.softmax.name), "probabilities centred", largest=before, centred=after)
    return True


def _probability_probe(a: Attention) -> Probe[MinMaxStat]:
    return MinMax().of(probabilities(a.values))


def probabilities(values: Values) -> ir.Value:
    """What the product reads beside V."""
    p = values.matmul.inputs[1 - values.slot]
    assert p is not None
    return p


def centre_probabilities(graph: ir.Graph, values: Values, p0: float) -> None:
    """One Sub in front of the product; one ReduceSum over the keys, a Mul and an Add behind it.  Exact for any rows of P."""
    matmul, slot, p = values.matmul, values.slot, probabilities(values)
    v = matmul.inputs[slot]
    assert v is not None
    name, dtype = str(matmul.name), p.dtype.numpy() if p.dtype is not None else np.dtype(np.float32)
    centre = add_constant(graph, f"{name}_centre", np.asarray(p0, dtype), p.dtype)
    moved = new_node(graph, "Sub", [p, centre], name=f"{name}_centred", like=p)
    insert_after(graph, p, moved)
    redirect(p, moved.outputs[0], [(matmul, 1 - slot)])
    total = _sum_over_keys(graph, v, -2 if slot == 1 else -1, name)
    part = new_node(graph, "Mul", [total.outputs[0], centre], name=f"{name}_part", like=total.outputs[0])
    insert_after(graph, v, total, part)
    product = matmul.outputs[0]
    back = new_node(graph, "Add", [product, part.outputs[0]], name=f"{name}_uncentred", like=product)
    splice_after(graph, product, back)
    for node in (total, part, back):
        keep_float(node, "the compensation of centred probabilities")


def _sum_over_keys(graph: ir.Graph, v: ir.Value, axis: int, name: str) -> ir.Node:
    if (graph.opset_imports.get("") or 0) >= _AXES_AS_INPUT:
        axes = add_constant(graph, f"{name}_keys", np.array([axis], np.int64))
        total = new_node(graph, "ReduceSum", [v, axes], name=f"{name}_key_sum", attributes={"keepdims": 1})
    else:
        total = new_node(graph, "ReduceSum", [v], name=f"{name}_key_sum", attributes={"axes": [axis], "keepdims": 1})
    total.outputs[0].type = v.type
    if v.shape is not None:
        total.outputs[0].shape = ir.Shape([1 if i == axis + len(v.shape) else d for i, d in enumerate(v.shape)])
    return total
