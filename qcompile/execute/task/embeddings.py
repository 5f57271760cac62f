"""Embeddings: the cosine between both models' vectors, and how well similarities of pairs rank as people rank them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import DataError
from qcompile.execute.task.metric import Batch, rows_of
from qcompile.execute.task.score import F64, Means, Score, drawn, ranks


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of samples [P, 2] by their numbers in the stored data, and how alike somebody says they are [P]."""

    rows: NDArray[np.intp]
    scores: F64


@dataclass
class Embeddings:
    """Vectors on the last axis of `output`; of pairs, one vector a sample."""

    output: str
    pairs: Pairs | None = None
    cosines: Means = field(default_factory=Means)
    worst: float = 1.0
    vectors: dict[int, tuple[F64, F64]] = field(default_factory=dict[int, tuple[F64, F64]])

    @property
    def title(self) -> str:
        """Of which output."""
        return f"embeddings of output {self.output!r}"

    def add(self, batch: Batch) -> None:
        """Take a batch.

        Raises:
            DataError: pairs of something that is no vector a sample.
        """
        before, after = (rows_of(side[self.output]) for side in (batch.reference, batch.candidate))
        found = cosines(before, after)
        self.cosines.add(found)
        self.worst = min(self.worst, float(found.min(initial=1.0)))
        if self.pairs is None:
            return
        if before.ndim != 2:
            raise DataError(
                f"output {self.output!r} is {list(before.shape)}, and pairs need one vector a sample; name another (--on)"
            )
        for row, *vectors in zip(batch.rows, before, after, strict=True):
            self.vectors[row] = (vectors[0], vectors[1])

    def scores(self) -> tuple[Score, ...]:
        """Of pairs `spearman` of cosines and scores; the mean `cosine` to the reference's vectors, and the lowest."""
        mean = self.cosines.score("cosine", paired=False)
        return (*self._ranked(), mean, Score("lowest cosine", None, self.worst, mean.n))

    def _ranked(self) -> list[Score]:
        if self.pairs is None:
            return []
        kept = [i for i, (a, b) in enumerate(self.pairs.rows) if a in self.vectors and b in self.vectors]
        if len(kept) < 2:
            raise DataError("fewer than two pairs have both samples among those that ran; give more --samples")
        sides = [[np.stack([self.vectors[r][side] for r in self.pairs.rows[kept, end]]) for end in (0, 1)] for side in (0, 1)]
        alike = [cosines(first, second) for first, second in sides]
        return [drawn("spearman", (self.pairs.scores[kept], *alike), _spearman)]


def cosines(a: F64, b: F64) -> F64:
    """Of the vectors on the last axis; 1 where both are zero, 0 where one is."""
    size = np.sqrt(np.square(a).sum(-1) * np.square(b).sum(-1))
    return np.divide((a * b).sum(-1), size, out=np.array((a == b).all(-1), np.float64), where=size > 0)


def _spearman(scores: F64, before: F64, after: F64, side: int) -> float:
    """Spearman's rank correlation, ties at their mean rank; none where one side is constant."""
    ours, theirs = (r - r.mean() for r in map(ranks, (scores, (before, after)[side])))
    size = float(np.sqrt((ours @ ours) * (theirs @ theirs)))
    return float(ours @ theirs) / size if size else float("nan")
