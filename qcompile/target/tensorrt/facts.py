"""What is known of an attention block before it is built, and the head size that would make it one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from qcompile.ir.ops import is_op, static_shape
from qcompile.quant.spec import Scheme
from qcompile.structure.scores import Scores, Values
from qcompile.target.platform import Platform
from qcompile.target.tensorrt.fusion import HEADS, BlockFacts, obstacles


def facts_of(code: str | None, scores: Scores[ir.Node], values: Values[ir.Node]) -> BlockFacts:
    """A block whose operands have the type `code` (None: float), its output quantized."""
    made = _sizes(scores.matmul.outputs[0])
    return BlockFacts(
        code,
        head=_sizes(scores.matmul.inputs[0])[1],
        value_head=_sizes(values.matmul.outputs[0])[1 if values.slot else 0],
        queries=made[0],
        keys=(made[1], made[1]),
        softcap=any(is_op(n, "Tanh") for n in scores.between),
        guard=any(is_op(n, "Where") and is_op(n.inputs[0].producer(), "IsNaN") for n in values.changed if n.inputs[0]),
    )


def padded_head(platform: Platform, scheme: Scheme, scores: Scores[ir.Node], values: Values[ir.Node]) -> int | None:
    """The smallest size for which nothing stands against one kernel, where something does for its own."""
    if not platform.native(scheme):
        return None
    activation = scheme.fallback or scheme.activation
    facts = facts_of(None if activation is None else activation.name, scores, values)
    if facts.head is None or facts.value_head is None or not [*obstacles(facts)]:
        return None
    return next((s for s in _wider(facts) if not [*obstacles(replace(facts, head=s, value_head=s))]), None)


def _wider(facts: BlockFacts) -> Sequence[int]:
    least = max(facts.head or 0, facts.value_head or 0)
    return [s for s in HEADS.get(facts.code or "", range(16, 257, 8)) if s >= least]


def _sizes(value: ir.Value | None) -> tuple[int | None, int | None]:
    """The last two axes, None where unknown."""
    shape = static_shape(value) or ()
    return (shape[-2], shape[-1]) if len(shape) >= 2 else (None, None)
