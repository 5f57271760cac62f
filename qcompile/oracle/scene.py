"""What the range analysis knows about a graph while it walks over it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from numpy.typing import NDArray

from qcompile.oracle.graph import Op
from qcompile.oracle.interval import Range

Array = NDArray[Any]
Shape = tuple[int | None, ...]
LONGEST = 1 << 15  # what an axis of unknown length may hold: int8 products summed over it stay below 2^31


class Unbounded(Exception):
    """No bound follows from what is known; the message says what is missing."""


@dataclass
class Scene:
    """What is known about the tensors of one graph, and what had to be assumed or is wrong.

    `shapes` hold None for axes of unknown length; `problems` are (rule, message) of the operator at hand,
    `sums` the int32 sums inside it (QLinearConv, QLinearMatMul).
    """

    ranges: dict[str, Range]
    constants: Mapping[str, Array]
    shapes: Mapping[str, Shape]
    makers: Mapping[str, Op]
    inputs: frozenset[str]
    assumptions: set[str] = field(default_factory=set[str])
    problems: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    sums: list[tuple[Op, Range]] = field(default_factory=list[tuple[Op, Range]])

    def of(self, op: Op, slot: int) -> Range:
        """The range of an input."""
        return self.ranges[op.inputs[slot]]

    def given(self, op: Op, slot: int) -> bool:
        """Whether an optional input is there."""
        return slot < len(op.inputs) and bool(op.inputs[slot])

    def constant(self, op: Op, slot: int) -> Array | None:
        """An input's value, if it is known."""
        return self.constants.get(op.inputs[slot]) if self.given(op, slot) else None

    def shape(self, name: str) -> Shape:
        """Raises Unbounded: not even the rank is known."""
        found = self.shapes.get(name)
        if found is None:
            raise Unbounded(f"the shape of {name!r} is unknown")
        return found

    def counts(self, op: Op, sizes: Shape) -> tuple[int, int]:
        """(fewest, most) elements in axes of these sizes; an unknown one is assumed to hold 1 to 32768."""
        if None in sizes:
            self.assumptions.add(f"{op}: axes of unknown length hold at most {LONGEST} elements")
        known = prod(s for s in sizes if s is not None)
        return known, known * LONGEST ** sizes.count(None)

    def problem(self, rule: str, message: str) -> None:
        """Note what is wrong with the operator at hand."""
        self.problems.append((rule, message))


Transfer = Callable[[Scene, Op], Range]
