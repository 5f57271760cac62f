"""split-range: two products for values whose small and large parts want scales of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import onnx_ir as ir

from qcompile.calib.observe import MinMax, MinMaxStat, Probe, Rows, RowsStat
from qcompile.calib.observe.change import FOLD_ROWS
from qcompile.decide.quantizer import value_at
from qcompile.ir.edit import add_constant, erase, insert_after, new_node, replace_value
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array, is_op
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult
from qcompile.quant.companding import companded_type, fit, twin_branches
from qcompile.structure import Mlp, find_mlps
from qcompile.structure.scores import Scores, Values, find_scores, find_values
from qcompile.target.tensorrt.branches import mark_branch

_SEARCHED = 128
_LEAST_ROWS = 2


@dataclass(frozen=True)
class SplitRange(Pass):
    """Lower PTQ4ViT's twin quantizers exactly: one integer product for each of two ranges (arXiv:2111.12293, eq. 7-8).

    before: MatMul(GELU, W) + c    after: (MatMul(Relu(h), W) + MatMul(Min(h, 0), W)) + c
    before: MatMul(P, V)           after: MatMul(Where(P < split, P, 0), V) + MatMul(P - Where(..), V)
    Each value is in one branch only, and each branch gets its own scale, so the sum of the quantized branches is the
    piecewise quantizer.  Exact in float on every target, at twice the multiplications: `center{gelu}` often buys more for one
    Sub.
    softmax also takes attention out of TensorRT's fused kernel.  The split is the twin quantizer's on calibration rows.
    """

    name = "split-range"
    kind = Kind.EQUIVALENT
    mlp: Annotated[bool, "split what the second linear of an MLP reads at 0"] = True
    softmax: Annotated[bool, "split probabilities at a searched threshold (leaves the fused attention kernel)"] = False

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """Ranges of the hidden layers and rows of the probabilities."""
        if ctx.scheme.activation is not None:
            yield from (_range_probe(m) for m in self._mlps(model))
            yield from (_rows_probe(v) for _, v in self._products(model))

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Split every site that has two ranges."""
        if ctx.scheme.activation is None:
            ctx.remarks.missed("", "the scheme leaves activations in float, nothing to split")
            return PassResult(False)
        done = [_split_mlp(model.graph, m, ctx) for m in list(self._mlps(model))]
        done += [_split_product(model.graph, softmax, v, ctx) for softmax, v in list(self._products(model))]
        if not ctx.remarks.all:
            ctx.remarks.note("", "nothing reads a GELU or a softmax" if self.softmax else "no linear layer reads a GELU")
        return PassResult(any(done))

    def _mlps(self, model: Model) -> Iterator[Mlp]:
        yield from find_mlps(model.graph).found if self.mlp else ()

    def _products(self, model: Model) -> Iterator[tuple[ir.Node, Values]]:
        for node in model.graph if self.softmax else ():
            values = find_values(node) if is_op(node, "Softmax") else None
            if values is not None:
                yield node, values


def _split_mlp(graph: ir.Graph, m: Mlp, ctx: PassContext) -> bool:
    node, stat = m.fc2.node, ctx.told[_range_probe(m)]
    low, high = float(stat.lo.min()), float(stat.hi.max())
    reason = ctx.selection.excluded(node)
    if m.fc2.kind == "conv" or m.fc2.input_slot != 0:
        reason = reason or "it is not a MatMul or Gemm with a right-hand weight"
    if low >= 0 or high <= 0:
        reason = reason or f"its input has one sign only ({m.kind})"
    if reason:
        ctx.remarks.missed(str(node.name), reason, low=low, high=high)
        return False
    x = m.fc2.input
    zero = _constant(graph, x, "zero", 0.0)
    parts = [new_node(graph, "Relu", [x], name=f"{node.name}_positive", like=x)]
    parts.append(new_node(graph, "Min", [x, zero], name=f"{node.name}_negative", like=x))
    insert_after(graph, x, *parts)
    _two_products(graph, node, 0, [p.outputs[0] for p in parts], lambda: _weight_copy(graph, node))
    ctx.remarks.applied(str(node.name), "one product for positive, one for negative inputs", low=low, high=high)
    return True


def _split_product(graph: ir.Graph, softmax: ir.Node, values: Values[ir.Node], ctx: PassContext) -> bool:
    node, slot = values.matmul, 1 - values.slot
    stat, reason = ctx.told[_rows_probe(values)], ctx.selection.excluded(node) or ctx.selection.excluded(softmax)
    if len(stat.rows) < _LEAST_ROWS:
        reason = reason or "its probabilities were not measured"
    if reason:
        ctx.remarks.missed(str(softmax.name), reason)
        return False
    bits = min(ctx.scheme.activation.bits, 8) if ctx.scheme.activation else 8
    coded = companded_type("twin", bits)
    params = fit(coded, stat.rows[:_SEARCHED])
    _, _, split = twin_branches(float(params.scale), round(params.curve[0]), bits, False)
    p = node.inputs[slot]
    assert p is not None
    limit, zero = _constant(graph, p, "split", split), _constant(graph, p, "zero", 0.0)
    below = new_node(graph, "Less", [p, limit], name=f"{node.name}_below", like=p)
    below.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
    low = new_node(graph, "Where", [below.outputs[0], p, zero], name=f"{node.name}_low", like=p)
    high = new_node(graph, "Sub", [p, low.outputs[0]], name=f"{node.name}_high", like=p)
    insert_after(graph, p, below, low, high)
    scores = find_scores(softmax)
    for branch in _two_products(graph, node, slot, [low.outputs[0], high.outputs[0]], None):
        mark_branch(branch)
    if isinstance(scores, Scores):
        mark_branch(scores.matmul)
    ctx.remarks.applied(str(softmax.name), "one product for small, one for large probabilities", split=split)
    return True


def _two_products(
    graph: ir.Graph, node: ir.Node, slot: int, parts: list[ir.Value], weight: Callable[[], ir.Value] | None
) -> list[ir.Node]:
    """`node` on each part, summed; only the first keeps a Gemm's bias."""
    branches: list[ir.Node] = []
    for i, part in enumerate(parts):
        inputs = list(node.inputs[:2] if i else node.inputs)
        inputs[slot] = part
        if weight is not None:
            inputs[1 - slot] = weight()
        branch = new_node(graph, node.op_type, inputs, name=f"{node.name}_{('first', 'second')[i]}", like=node.outputs[0])
        branch.attributes.update(node.attributes)
        branches.append(branch)
    total = new_node(graph, "Add", [b.outputs[0] for b in branches], name=f"{node.name}_sum", like=node.outputs[0])
    graph.insert_before(node, [*branches, total])
    replace_value(graph, node.outputs[0], total.outputs[0])
    erase(graph, node)
    return branches


def _weight_copy(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """A weight of its own for each branch: its rounding is fitted to the branch's inputs."""
    array, old = const_array(node.inputs[1]), node.inputs[1]
    assert array is not None and old is not None
    return add_constant(graph, f"{node.name}_branch_weight", array, old.dtype)


def _constant(graph: ir.Graph, like: ir.Value, name: str, x: float) -> ir.Value:
    dtype = like.dtype.numpy() if like.dtype is not None else np.dtype(np.float32)
    return add_constant(graph, f"{like.name}_{name}", np.asarray(x, dtype), like.dtype)


def _range_probe(m: Mlp) -> Probe[MinMaxStat]:
    return MinMax().of(m.fc2.input)


def _rows_probe(values: Values[ir.Node]) -> Probe[RowsStat]:
    return Rows(FOLD_ROWS).of(value_at(values.matmul, 1 - values.slot))
