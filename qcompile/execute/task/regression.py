"""Regression: MAE, RMSE and R2 against targets, or against the float model's output where there are none."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.execute.task.metric import Batch, shaped
from qcompile.execute.task.score import F64, Means, Score, drawn


@dataclass
class Regression:
    """Real numbers of `output`; targets of the same size."""

    output: str
    absolute: Means = field(default_factory=Means)
    squares: Means = field(default_factory=Means)
    truth: Means = field(default_factory=Means)
    labelled: bool = False

    @property
    def title(self) -> str:
        """Of which output, against what."""
        return f"regression of output {self.output!r}" + ("" if self.labelled else ", against the reference's")

    def add(self, batch: Batch) -> None:
        """Take a batch."""
        before, after = (np.asarray(s[self.output], np.float64) for s in (batch.reference, batch.candidate))
        self.labelled |= batch.labels is not None
        truth = before if batch.labels is None else shaped(batch.labels, before.shape, self.output).astype(np.float64)
        self.absolute.add(np.abs(after - truth), np.abs(before - truth))
        self.squares.add(np.square(after - truth), np.square(before - truth))
        self.truth.add(truth, np.square(truth))

    def scores(self) -> tuple[Score, ...]:
        """mae, rmse, r2 and mse."""
        counts, before, after = self.squares.columns()
        _, squares, sums = self.truth.columns()
        columns = (counts, before, after, squares, sums)
        return (
            self.absolute.score("mae", paired=self.labelled, better="lower"),
            drawn("rmse", columns, _rmse, "lower", paired=self.labelled),
            drawn("r2", columns, _r2, paired=self.labelled),
            self.squares.score("mse", paired=self.labelled, better="lower"),
        )


def _rmse(counts: F64, before: F64, after: F64, squares: F64, sums: F64, side: int) -> float:
    del squares, sums
    return float(np.sqrt((before, after)[side].sum() / max(counts.sum(), 1.0)))


def _r2(counts: F64, before: F64, after: F64, squares: F64, sums: F64, side: int) -> float:
    """1 - squared error / squared distance of the truth from its mean; none where the truth is constant."""
    spread = float(squares.sum() - np.square(sums.sum()) / max(counts.sum(), 1.0))
    return 1.0 - float((before, after)[side].sum()) / spread if spread > 1e-12 * float(squares.sum()) else float("nan")
