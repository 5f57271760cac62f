"""Stat: the base of everything that observers return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray


class NotCarried(Exception):
    """A statistic cannot follow a change of its tensor and has to be observed again."""


class Stat:
    """A value in a commutative monoid: `a.merge(b) == b.merge(a)`, associative, neutral `observer.empty()`."""

    def merge(self, other: Any) -> Self:
        """The statistic of both data sets together."""
        raise NotImplementedError

    def mapped(self, t: ArrayLike, r: ArrayLike) -> Self:
        """The statistic of x' = (x - t) / r.

        Raises:
            NotCarried: this statistic does not hold enough to follow the map.
        """
        raise NotCarried(f"{type(self).__name__} cannot follow a change of its tensor")

    def folded(self, finished: int) -> Self:
        """The same statistic, told that the chunks below `finished` are complete (see `qcompile.calib.observe.chunks`)."""
        return self

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Plain arrays that `from_arrays` reads back bit for bit."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in _fields(self)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Self:
        """The statistic that `to_arrays` wrote."""
        return cls(**{f.name: int(arrays[f.name]) if f.type == "int" else arrays[f.name] for f in _fields(cls)})


def _fields(stat: Any) -> Any:
    return fields(stat)


def other_axes(ndim: int, axis: int | None) -> tuple[int, ...]:
    """The axes that a per-`axis` reduction removes (all of them when `axis` is None)."""
    if axis is None:
        return tuple(range(ndim))
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis {axis} does not exist in a tensor of rank {ndim}")
    return tuple(i for i in range(ndim) if i != axis % ndim)


def width(shape: Sequence[int], axis: int | None = -1) -> int:
    """The length of an axis; of the last one where there is no such axis, 1 for a single number."""
    if not shape:
        return 1
    return shape[axis] if axis is not None and -len(shape) <= axis < len(shape) else shape[-1]


def by_head(values: NDArray[Any], heads: int | None) -> NDArray[Any]:
    """[..., C] as [..., heads, C / heads]; [..., C, 1] when there are no heads to tell apart.

    Raises:
        ValueError: C is not a multiple of `heads`.
    """
    if heads is None:
        return values[..., None]
    if values.ndim == 0 or values.shape[-1] % heads:
        raise ValueError(f"{values.shape[-1] if values.ndim else 1} channels cannot be split into {heads} heads")
    return values.reshape(*values.shape[:-1], heads, -1)
