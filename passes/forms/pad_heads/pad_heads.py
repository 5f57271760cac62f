"""pad-heads: attention heads in a size that has a fused kernel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.calib.observe.change import Changes
from qcompile.ir.infer import infer_shapes
from qcompile.ir.model import Model
from qcompile.ir.ops import is_data_movement, is_op, static_shape
from qcompile.passes.forms.pad_heads.nodes import pad_operands
from qcompile.passes.forms.pad_heads.weights import pad_weights
from qcompile.pipeline.base import Kind, PassContext, Stage
from qcompile.pipeline.site import Applied, Missed, SitePass
from qcompile.structure import Attention, Matches, find_attentions
from qcompile.structure.scores import Scores, Values, find_scores, find_values


@dataclass(frozen=True)
class Block:
    """One attention: the walk around its softmax, its projections where they are known, and the size that would fuse."""

    softmax: ir.Node
    scores: Scores[ir.Node]
    values: Values[ir.Node]
    projected: Attention | None
    size: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Channels of a head of q and of v."""
        q, v = static_shape(self.scores.matmul.inputs[0]) or (), static_shape(self.values.matmul.outputs[0]) or ()
        return q[-1] or 0, v[-1 if self.values.slot else -2] or 0


@dataclass(frozen=True)
class PadHeads(SitePass[Block]):
    """Widen attention heads with zeros to a size for which the target has a fused kernel, where it has none for theirs.

    before: heads of 24, INT8: three kernels     after: heads of 32: one
    Zeros in q and k add nothing to a score; zeros in v are channels for which the output projection has zeros.  Where the heads
    can be followed to their projections, the zeros are columns of the weights of q, k, v and rows of the output's: no node, but
    larger weights.  Elsewhere (rotary embeddings, norms of q and k, caches) a Pad goes in front of each product, and a Slice
    behind the last.  The target says which size fuses (`Target.padded_head`); blocks that no size helps stay as they are.
    """

    name = "pad-heads"
    kind = Kind.EQUIVALENT
    needs = Stage.CANONICAL
    nothing = "no attention that padded heads would make one kernel"

    def sites(self, model: Model, ctx: PassContext) -> Matches[Block]:
        """Every attention of which the target says so."""
        known = {a.softmax: a for a in find_attentions(model.graph)}
        return Matches(tuple(b for n in model.graph if is_op(n, "Softmax") and (b := _block(n, known.get(n), ctx)) is not None))

    def node(self, site: Block) -> ir.Node:
        """Q K^T stands for the block."""
        return site.scores.matmul

    def nodes(self, site: Block) -> Iterable[ir.Node]:
        """A product that stays float keeps its heads."""
        return site.scores.matmul, site.values.matmul

    def rewrite(self, model: Model, site: Block, ctx: PassContext, changes: Changes) -> Applied | Missed:
        """Pad the weights, or the operands."""
        (q, v), size = site.sizes, site.size
        if any(_dequantized(x) for x in (*site.scores.matmul.inputs, *site.values.matmul.inputs)):
            return Missed("its operands are quantized already")
        added = None if site.projected is None else pad_weights(model.graph, site.projected, size, changes)
        was = f"{q}" if q == v else f"{q} (q, k) and {v} (v)"
        if added is not None:
            return Applied(f"heads of {was} padded to {size} in the weights of its projections", {"values": added})
        pad_operands(model.graph, site.scores.matmul, site.values, (q, v), size)
        return Applied(f"heads of {was} padded to {size} in front of its products")

    def finish(self, model: Model) -> None:
        """Learn the new sizes."""
        infer_shapes(model)


def _dequantized(value: ir.Value | None) -> bool:
    """Whether the tensor is made of codes, itself or moved."""
    producer = None if value is None else value.producer()
    if producer is None or not is_data_movement(producer):
        return is_op(producer, "DequantizeLinear")
    return _dequantized(producer.inputs[0])


def _block(softmax: ir.Node, projected: Attention | None, ctx: PassContext) -> Block | None:
    scores, values = find_scores(softmax), find_values(softmax)
    if not isinstance(scores, Scores) or values is None:
        return None
    size = ctx.target.padded_head(ctx.scheme, scores, values)
    return None if size is None else Block(softmax, scores, values, projected, size)
