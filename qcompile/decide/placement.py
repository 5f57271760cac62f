"""What placements answer: the points that annotate turns into decisions, and the refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from qcompile.decide.quantizer import value_at
from qcompile.quant.ranges import Function
from qcompile.quant.spec import QuantSpec


@dataclass(frozen=True)
class Point:
    """One input (slot >= 0) or output (~i) to quantize; its range is that of the tensor `like` if given.

    `carried`: measured per channel and by sampled rows, which follow the folds of earlier passes.
    `bounds`: a range that is known without measuring.  `follows`: takes over the decision of another use of the tensor.
    `seen`: the function of every element through which alone the tensor is seen.  `joined`: a wider tensor that holds this one;
    its range serves both unless it is much too wide.
    """

    node: ir.Node
    slot: int
    spec: QuantSpec
    like: ir.Value | None = None
    carried: bool = False
    bounds: tuple[float, float] | None = None
    follows: Point | None = None
    seen: Function | None = None
    joined: ir.Value | None = None

    @property
    def measured(self) -> ir.Value:
        """The tensor whose statistics set the range."""
        return self.like or self.value

    @property
    def value(self) -> ir.Value:
        """The tensor to quantize."""
        return value_at(self.node, self.slot)

    @property
    def is_weight(self) -> bool:
        """Whether the tensor is a constant."""
        return self.value.const_value is not None


@dataclass
class Placement:
    """Points to quantize, (node, reason) for compute that stays in float, and (node, remark) for what differs from the scheme."""

    points: list[Point] = field(default_factory=list[Point])
    missed: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    notes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    _specs: dict[ir.Value, list[QuantSpec]] = field(default_factory=dict[ir.Value, list[QuantSpec]])

    def add(
        self,
        node: ir.Node,
        slot: int,
        spec: QuantSpec,
        like: ir.Value | None = None,
        *,
        carried: bool = False,
        seen: Function | None = None,
    ) -> None:
        """Quantize `slot` of `node`, once."""
        if all(s.node is not node or s.slot != slot for s in self.points[-64:]):
            self._append(Point(node, slot, spec, like, carried, seen=seen))

    def known(self, node: ir.Node, slot: int, spec: QuantSpec, bounds: tuple[float, float]) -> None:
        """Quantize `slot` of `node` over a range that is known."""
        self._append(Point(node, slot, spec, bounds=bounds))

    def follow(self, node: ir.Node, slot: int, leader: Point) -> None:
        """Let `slot` of `node` read what `leader` reads."""
        self._append(Point(node, slot, leader.spec, follows=leader))

    def specs(self, value: ir.Value | None) -> Sequence[QuantSpec]:
        """How the uses of a tensor are quantized so far."""
        return () if value is None else self._specs.get(value, ())

    def _append(self, point: Point) -> None:
        self.points.append(point)
        self._specs.setdefault(point.value, []).append(point.spec)

    def miss(self, node: ir.Node, reason: str) -> None:
        """Leave `node` in float."""
        self.missed.append((str(node.name), reason))

    def note(self, node: ir.Node, reason: str) -> None:
        """Quantize `node` otherwise than the scheme says."""
        self.notes.append((str(node.name), reason))
