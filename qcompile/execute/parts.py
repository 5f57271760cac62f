"""The parts of an output that joins unlike quantities: boxes and scores by Concat, or channels of unlike size.

The error of the large part drowns that of the small one: an output of boxes in pixels and scores below 1 stands at the boxes'
35 dB whatever becomes of the scores.  A part is said where it stands 3 dB or more below the whole.  The shares of a Softmax are
alike, however small some are, and so are the places of a map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.execute.metrics import decibel
from qcompile.ir.infer import infer_shapes
from qcompile.ir.model import Model
from qcompile.ir.ops import input_at, int_attr, ints_attr, is_op, static_shape
from qcompile.report import OutputPart

F64 = NDArray[np.float64]
_HIDDEN_DB = 3.0
_GAP = 10.0  # between the sizes of channels that are unlike
_LARGEST_AXIS = 1024
_PASSES = ("Cast", "Identity", "Sigmoid", "Transpose")


@dataclass(frozen=True)
class Join:
    """An axis along which an output was joined: the name and the size of each part; without parts, shares of one whole.

    A negative `axis` counts from the last.
    """

    axis: int
    parts: tuple[tuple[str, int], ...]


def joins(model: Model) -> list[Join | None]:
    """How each output of `model` was joined: by a Concat of static sizes, seen through what leaves the parts where they are."""
    found = [_concat_behind(v) for v in model.graph.outputs]
    made = [_join(*f) if f is not None else _shares(v) for f, v in zip(found, model.graph.outputs, strict=True)]
    if all(f is None or m for f, m in zip(found, made, strict=True)):
        return made
    copy = model.clone()
    infer_shapes(copy)  # strangers' files need not say the sizes of what is joined
    return [_join(*f) if f is not None else m for f, m in zip(map(_concat_behind, copy.graph.outputs), made, strict=True)]


def _shares(value: ir.Value) -> Join | None:
    """The axis along which an output is a Softmax."""
    node = value.producer()
    while node is not None and is_op(node, "Cast", "Identity"):
        source = input_at(node, 0)
        node = None if source is None else source.producer()
    if node is None or not is_op(node, "Softmax"):
        return None
    return Join(int_attr(node, "axis", -1 if (node.version or 13) >= 13 else 1), ())


def _concat_behind(value: ir.Value) -> tuple[ir.Node, list[int]] | None:
    """The Concat that makes an output, and which of its axes each axis of the output is."""
    node, moved = value.producer(), list(range(len(value.shape or ())))
    while node is not None and is_op(node, *_PASSES):
        if is_op(node, "Transpose"):
            order = ints_attr(node, "perm") or tuple(reversed(moved))
            moved = [order[a] for a in moved] if sorted(order) == sorted(moved) else []
        source = input_at(node, 0)
        node = None if source is None else source.producer()
    return (node, moved) if node is not None and is_op(node, "Concat") else None


def _join(concat: ir.Node, moved: list[int]) -> Join | None:
    axis = int_attr(concat, "axis", 0) % max(1, len(moved))
    known = [(str(v.name), static_shape(v)) for v in concat.inputs if v is not None]
    parts = tuple((name, size) for name, shape in known if shape and axis < len(shape) and (size := shape[axis]))
    return Join(moved.index(axis), parts) if axis in moved and len(parts) == len(concat.inputs) > 1 else None


@dataclass
class PartTally:
    """Squared sizes and errors over runs and their number, for each index of each axis but the first."""

    join: Join | None = None
    sums: dict[int, F64] = field(default_factory=dict[int, F64])
    shape: tuple[int, ...] | None = None

    def add(self, reference: F64, candidate: F64) -> None:
        """Take a run of both, of one shape; what is not finite in the reference must be zero in both."""
        self.shape = reference.shape if self.shape is None else self.shape
        sums = (np.square(reference), np.square(candidate - reference), np.ones_like(reference))
        for axis in range(1, reference.ndim):
            if reference.shape[axis] > _LARGEST_AXIS or self.shape[axis : axis + 1] != reference.shape[axis : axis + 1]:
                self.sums.pop(axis, None)
                continue
            others = tuple(a for a in range(reference.ndim) if a != axis)
            here = np.stack([s.sum(others) for s in sums])
            self.sums[axis] = self.sums.get(axis, np.zeros_like(here)) + here

    def parts(self, whole_db: float) -> tuple[OutputPart, ...]:
        """`every` part; none where no part stands far below the whole."""
        worst = self.every()
        return worst if worst and worst[0].sqnr_db <= whole_db - _HIDDEN_DB else ()

    def every(self) -> tuple[OutputPart, ...]:
        """The parts of the way to cut that shows most, worst first; none of an output of one kind of quantity."""
        cuts = [sorted(cut, key=lambda p: p.sqnr_db) for cut in self._cuts()]
        return tuple(min((cut for cut in cuts if cut), key=lambda cut: cut[0].sqnr_db, default=[]))

    def _cuts(self) -> Iterator[list[OutputPart]]:
        if (joined := self._joined()) is not None:
            yield joined
            return
        alike = _places(self.shape or ())
        if self.join is not None and not self.join.parts:
            alike |= {self.join.axis % len(self.shape or ())}
        for axis, sums in self.sums.items():
            if axis in alike:
                continue
            groups = _unlike(np.sqrt(sums[0] / max(1.0, float(sums.shape[1]))))
            if len(groups) > 1:
                yield [_part(f"{_spans(g)} of axis {axis}", sums[:, g]) for g in groups]

    def _joined(self) -> list[OutputPart] | None:
        if self.join is None or not self.join.parts or (sums := self.sums.get(self.join.axis)) is None:
            return None
        ends = list(accumulate((size for _, size in self.join.parts), initial=0))
        if ends[-1] != sums.shape[1]:
            return None
        cuts = zip(self.join.parts, pairwise(ends), strict=True)
        return [_part(name, sums[:, a:b]) for (name, _), (a, b) in cuts if sums[0, a:b].any()]


def _places(shape: tuple[int, ...]) -> set[int]:
    """The axes of height and width of a map of few channels: a dark border is no other quantity."""
    if len(shape) != 4:
        return set()
    _, a, b, c = shape
    return {2, 3} if a <= min(b, c) else {1, 2} if c <= min(a, b) else set()


def _part(name: str, sums: F64) -> OutputPart:
    signal, noise, entries = (float(row.sum()) for row in sums)
    return OutputPart(name, decibel(signal, noise), float(np.sqrt(noise / max(entries, 1.0))))


def _unlike(sizes: F64) -> list[NDArray[np.intp]]:
    """Indices in groups whose sizes are a factor of ten apart, those of size 0 left out."""
    order = np.argsort(sizes, kind="stable")
    order = order[sizes[order] > 0]
    if not len(order):
        return []
    gaps = np.flatnonzero(sizes[order][1:] >= _GAP * sizes[order][:-1]) + 1
    return [np.sort(group) for group in np.split(order, gaps)]


def _spans(indices: Sequence[int] | NDArray[np.intp]) -> str:
    """`0-3, 7`: consecutive indices as one, at most three of them."""
    cuts = np.split(np.asarray(indices), np.flatnonzero(np.diff(indices) > 1) + 1)
    shown = [f"{c[0]}-{c[-1]}" if len(c) > 1 else f"{c[0]}" for c in cuts[:3]]
    return ", ".join(shown) + (f" and {len(indices) - sum(map(len, cuts[:3]))} more" if len(cuts) > 3 else "")
