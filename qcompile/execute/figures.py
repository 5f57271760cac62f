"""What is said of each output of a model beside those of another: a distance in dB, or the share of equal entries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.execute.metrics import Distance
from qcompile.execute.parts import PartTally, joins
from qcompile.ir.jumps import Nature, natures
from qcompile.ir.model import Model
from qcompile.report import OutputFigure

Array = NDArray[Any]
_BROKEN = 1e30  # what NaN or infinity counts where the reference is finite


@dataclass
class OutputTally:
    """Sums over runs of one output of two models.

    Floats are measured in dB over the entries that are finite in the reference.  Integers, flags, texts, what consists of
    jumps, and floats whose number itself differs, are judged by the share of entries that are equal.
    """

    name: str
    nature: Nature
    distance: Distance = field(default_factory=Distance)
    parts: PartTally = field(default_factory=PartTally)
    entries: int = 0
    equal: int = 0
    apart: bool = False

    def add(self, reference: Array, candidate: Array) -> None:
        """Take a run of both, any shapes."""
        self.apart |= reference.dtype.kind not in "fV" or reference.shape != candidate.shape or bool(self.nature.made)
        self.entries += max(reference.size, candidate.size)
        self.equal += _equal(reference, candidate)
        if not self.apart:
            pair = _finite(reference, candidate)
            self.distance.add(*pair)
            self.parts.add(*pair)

    def figure(self) -> OutputFigure:
        """What the runs so far say; neither figure for an output that differs from run to run."""
        share = self.equal / self.entries if self.entries else 1.0
        if self.nature.random:
            return OutputFigure(self.name, note=f"differs from run to run ({self.nature.random})")
        if self.apart:
            made = self.nature.made or self.nature.behind
            return OutputFigure(self.name, equal=share, note=f"jumps with {made}" if made else "")
        note = f"which entries it holds jumps with {self.nature.behind}" if self.nature.behind else ""
        sqnr = self.distance.sqnr_db
        return OutputFigure(self.name, sqnr_db=sqnr, note=note, parts=self.parts.parts(sqnr))


def tallies(model: Model) -> list[OutputTally]:
    """One for each output of `model`, the reference, in order."""
    named = zip(model.graph.outputs, natures(model.graph), joins(model), strict=True)
    return [OutputTally(str(value.name), nature, parts=PartTally(join)) for value, nature, join in named]


def figures(found: Iterable[OutputTally]) -> tuple[OutputFigure, ...]:
    """The outputs worst first: those in dB, then shares, then those that nothing can be said of."""
    return tuple(sorted((t.figure() for t in found), key=_rank))


def worst_db(found: Sequence[OutputFigure]) -> float | None:
    """The figure of a model: the lowest in dB; None where no output has one."""
    return min((f.sqnr_db for f in found if f.sqnr_db is not None), default=None)


def _rank(figure: OutputFigure) -> tuple[int, float]:
    if figure.sqnr_db is not None:
        return 0, figure.sqnr_db
    return (2, 0.0) if figure.equal is None else (1, figure.equal)


def _equal(a: Array, b: Array) -> int:
    if a.shape[1:] != b.shape[1:] or a.ndim != b.ndim:
        return 0
    rows = min(len(a), len(b)) if a.ndim else 1
    same, there = (a[:rows], b[:rows]) if a.ndim else (a, b)
    return int(np.sum((same == there) | ((same != same) & (there != there))))  # NaN is its own equal here


def _finite(reference: Array, candidate: Array) -> tuple[Array, Array]:
    """Both as float64, zero where the reference is not finite."""
    r, c = reference.astype(np.float64), candidate.astype(np.float64)
    held = np.isfinite(r)
    return np.where(held, r, 0.0), np.where(held, np.nan_to_num(c, nan=_BROKEN, posinf=_BROKEN, neginf=-_BROKEN), 0.0)
