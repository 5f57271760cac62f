"""Where the channels of a tensor go through data movement: an exact index algebra on axes.

An axis is a list of factors, outermost first.  A factor (size, stride) with index i contributes i * stride to the channel
number, so stride 0 is a token (batch, head copy, window) factor; `offset` is added to every channel number.  Example: a packed
qkv output [B, N, 3C] is ((B,0)), ((N,0)), ((3C,1)); after Reshape [B,N,3,H,D], Transpose and taking part 2 it is
((B,0)), ((H,D)), ((N,0)), ((D,1)) with offset 2C.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qcompile.ir.partial import Dim


@dataclass(frozen=True)
class Factor:
    """`size` indices, each step adding `stride` to the channel number."""

    size: Dim
    stride: int = 0


Axis = tuple[Factor, ...]


@dataclass(frozen=True)
class Layout:
    """Axes of a tensor; `open` means that more, unknown token axes may stand in front."""

    axes: tuple[Axis, ...]
    offset: int = 0
    open: bool = False

    @property
    def rank(self) -> int | None:
        """Number of axes, None while open."""
        return None if self.open else len(self.axes)

    def closed(self, rank: int) -> Layout | None:
        """This layout with a known rank, or None if it does not fit."""
        missing = rank - len(self.axes)
        if missing < 0 or (missing and not self.open):
            return None
        return replace(self, axes=(token(None),) * missing + self.axes, open=False)

    def index(self, axis: int) -> int | None:
        """Position of a possibly negative `axis` in `axes`; None if it is out of range or not known."""
        if axis < 0:
            axis += len(self.axes)
            return axis if axis >= 0 else None
        return None if self.open or axis >= len(self.axes) else axis

    def with_axis(self, index: int, axis: Axis) -> Layout:
        """A copy with one axis replaced."""
        return replace(self, axes=(*self.axes[:index], axis, *self.axes[index + 1 :]))

    def holds_channels(self, index: int) -> bool:
        """True if the channel number depends on this axis."""
        return any(f.stride for f in self.axes[index])

    def columns(self, index: int) -> NDArray[np.int64] | None:
        """Channel number of each element of one axis (others at index 0), or None if a size is not known."""
        return columns_of(self.axes[index], self.offset)

    def channel_factors(self) -> Axis:
        """All factors with a nonzero stride, in axis order."""
        return tuple(f for axis in self.axes for f in axis if f.stride)


def token(size: Dim) -> Axis:
    """An axis without channels."""
    return () if size == 1 else (Factor(size),)


def channels(size: int) -> Axis:
    """An axis that is the whole channel axis."""
    return (Factor(size, 1),) if size != 1 else ()


def columns_of(axis: Iterable[Factor], offset: int = 0) -> NDArray[np.int64] | None:
    """Channel numbers along a factored axis, shape [product of sizes]."""
    numbers = np.array([offset], dtype=np.int64)
    for factor in axis:
        if not isinstance(factor.size, int):
            return None
        numbers = (numbers[:, None] + np.arange(factor.size) * factor.stride).reshape(-1)
    return numbers


def size_of(axis: Iterable[Factor]) -> int | None:
    """Number of elements of an axis, or None if unknown."""
    total = 1
    for factor in axis:
        if not isinstance(factor.size, int):
            return None
        total *= factor.size
    return total


def reshape(layout: Layout, target: Sequence[Dim]) -> Layout | None:
    """The layout after Reshape to `target`, or None if the sizes do not prove where the channels go."""
    source = [f for axis in layout.axes for f in axis if f.size != 1]
    split = _Reshape(source, list(target))
    split.from_right(pair_unknown=False)
    if not layout.open:
        split.from_left()
    if not split.finish(layout.open):
        return None
    return Layout(tuple(tuple(axis) for axis in split.axes), layout.offset)


class _Reshape:
    """Match the factors of the source with the dimensions of the target from both ends."""

    def __init__(self, source: list[Factor], target: list[Dim]) -> None:
        self.source, self.target = source, target
        self.axes: list[list[Factor]] = [[] for _ in target]
        self.low, self.high = 0, len(target)

    def from_right(self, *, pair_unknown: bool) -> None:
        while self.high > self.low:
            taken = _take(self.source, self.target[self.high - 1], right=True, pair_unknown=pair_unknown)
            if taken is None:
                return
            self.high -= 1
            self.axes[self.high] = taken

    def from_left(self) -> None:
        while self.high > self.low:
            taken = _take(self.source, self.target[self.low], right=False, pair_unknown=False)
            if taken is None:
                return
            self.axes[self.low] = taken
            self.low += 1

    def finish(self, is_open: bool) -> bool:
        """Place what is left; False if that is ambiguous."""
        rest = range(self.low, self.high)
        if len(rest) == 1 and not is_open:
            self.axes[self.low] = self.source
            return True
        if not any(f.stride for f in self.source):
            for i in rest:
                self.axes[i] = list(token(self.target[i]))
            return bool(rest) or is_open or not self.source
        if is_open or not rest:
            return False
        self.from_right(pair_unknown=True)
        return self.high == self.low and not self.source


def _take(source: list[Factor], dim: Dim, *, right: bool, pair_unknown: bool) -> list[Factor] | None:
    """Remove the factors that make up `dim` from one end of `source`; None (and nothing removed) if that is not certain."""
    if dim == 1:
        return []
    end = -1 if right else 0
    if not source:
        return None
    if not isinstance(dim, int):
        same = source[end].size == dim and dim is not None
        unknown = pair_unknown and not isinstance(source[end].size, int)
        return [source.pop(end)] if same or unknown else None
    return _take_known(source, dim, right=right)


def _take_known(source: list[Factor], dim: int, *, right: bool) -> list[Factor] | None:
    end = -1 if right else 0
    kept, taken, left = list(source), [], dim
    while left > 1 and kept:
        factor = kept.pop(end)
        if not isinstance(factor.size, int):
            return None
        if left % factor.size == 0:
            taken.append(factor)
            left //= factor.size
            continue
        if factor.size % left:
            return None
        inner, outer = _split(factor, left if right else factor.size // left)
        taken.append(inner if right else outer)
        kept.append(outer) if right else kept.insert(0, inner)
        left = 1
    if left > 1:
        return None
    source[:] = kept
    return taken[::-1] if right else taken


def _split(factor: Factor, inner_size: int) -> tuple[Factor, Factor]:
    assert isinstance(factor.size, int)
    return Factor(inner_size, factor.stride), Factor(factor.size // inner_size, factor.stride * inner_size)


def cut(layout: Layout, index: int, start: int, stop: int) -> Layout | None:
    """The layout of `x[start:stop]` along one axis of known size; None if the range is not a block of whole factors."""
    axis, offset = list(layout.axes[index]), layout.offset
    while axis:
        head, inner = axis[0], size_of(axis[1:])
        if inner is None or not isinstance(head.size, int):
            return None
        if start % inner == 0 and stop % inner == 0:
            count = (stop - start) // inner
            axis = [*([Factor(count, head.stride)] if count != 1 else []), *axis[1:]]
            return replace(layout.with_axis(index, tuple(axis)), offset=offset + start // inner * head.stride)
        first = start // inner
        if (stop - 1) // inner != first:
            return None
        axis, offset = axis[1:], offset + first * head.stride
        start, stop = start - first * inner, stop - first * inner
    return replace(layout.with_axis(index, ()), offset=offset) if (start, stop) == (0, 1) else None
