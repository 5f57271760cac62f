"""Stat: the base of everything that observers return."""

from __future__ import annotations

from typing import Any, Self

from numpy.typing import ArrayLike


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
