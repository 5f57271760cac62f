"""What the lowering of one step is told: the plan, the emitter, and the formats that readers ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.decide.decisions import decision
from qcompile.errors import ModelError
from qcompile.ir.ops import const_scalar, input_at, is_op
from qcompile.passes.lower.integer.emit import UNBOUNDED, Emitter, Fixed, Format, format_of
from qcompile.structure.core import data_uses
from qcompile.target.integer.plan import Plan, entry, leaves, settled

EXP_FRACTION_BITS = 8
SCORES = Format(math.log(2) / (1 << EXP_FRACTION_BITS), 0, -(1 << 24), 1 << 24)


@dataclass
class Scene:
    """The graph being lowered."""

    em: Emitter
    plan: Plan

    def input_format(self, node: ir.Node, slot: int) -> Format:
        """What `annotate` decided for an input.

        Raises:
            ModelError: nothing was decided.
        """
        found = decision(node, slot)
        if found is None or found.qparams is None:
            raise ModelError(f"input {slot} of {node.name!r} has no decision; run annotate for --target integer first")
        return format_of(found)

    def stored_format(self, value: ir.Value) -> Format:
        """The format in which `value` is rounded.

        Raises:
            ModelError: nothing was decided.
        """
        found = self.decided_format(value)
        if found is None:
            raise ModelError(f"nothing says how {value.name!r} is stored; run annotate for --target integer first")
        return found

    def decided_format(self, value: ir.Value) -> Format | None:
        """The format of `value`: its own, else that of its readers (the finest); None if nothing was decided."""
        last = settled(value)
        maker, index = last.producer(), last.index()
        own = decision(maker, ~index) if maker is not None and index is not None else None
        if own is not None and own.qparams is not None:
            return format_of(own)
        wanted = [f for leaf in leaves(self.plan, last) if (f := self._leaf_format(leaf.node, leaf.slot, leaf.want, leaf.factor))]
        return min(wanted, key=lambda f: f.scale, default=None)

    def shared_format(self, value: ir.Value) -> Format | None:
        """The int8 codes that all readers of `value` want; None if they differ, or want something else."""
        last = settled(value)
        readers = list(leaves(self.plan, last))
        maker, index = last.producer(), last.index()
        if (maker is not None and index is not None and decision(maker, ~index)) or any(r.want != "int8" for r in readers):
            return None
        formats = {self._leaf_format(r.node, r.slot, r.want, r.factor) for r in readers}
        return formats.pop() if len(formats) == 1 else None

    def _leaf_format(self, node: ir.Node | None, slot: int, want: str, factor: float) -> Format | None:
        if want == "scores":
            return SCORES.scaled(1 / factor)
        if node is None or (want == "raw" and decision(node, slot) is None):
            return None
        step = self.plan.of[node]
        reader = (node, slot) if decision(node, slot) is not None else entry(step)
        return self.input_format(*reader).scaled(1 / factor)

    def clamp_behind(self, value: ir.Value) -> tuple[float, float]:
        """The limits of the clamps that alone read `value`."""
        low, high = UNBOUNDED
        while (uses := data_uses(value)) and settled(value) is not value:
            bounds = clamp_bounds(uses[0][0])
            low, high = min(max(low, bounds[0]), bounds[1]), max(min(high, bounds[1]), bounds[0])
            value = uses[0][0].outputs[0]
        return low, high


def clamp_bounds(node: ir.Node) -> tuple[float, float]:
    """The real limits of a Relu or Clip."""
    if is_op(node, "Relu"):
        return 0.0, math.inf
    low, high = (const_scalar(input_at(node, slot)) for slot in (1, 2))
    return (-math.inf if low is None else low), (math.inf if high is None else high)


def narrowed(term: Fixed, bounds: tuple[float, float]) -> Fixed:
    """The tensor with one more clamp waiting (composition: the later one wins)."""
    low, high = (min(max(c, bounds[0]), bounds[1]) for c in term.clamp)
    return Fixed(term.value, term.scale, term.lo, term.hi, term.zero, (low, high))
