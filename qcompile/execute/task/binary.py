"""Two classes by one number: accuracy at the threshold, and the area under the ROC curve, which needs none."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.execute.task.metric import Array, Batch
from qcompile.execute.task.score import F64, Means, Score, drawn, ranks


@dataclass
class Binary:
    """One number an entry of `output`, a probability or a logit; labels 0 and 1."""

    output: str
    labels: list[Array] = field(default_factory=list[Array])
    sides: tuple[list[Array], list[Array]] = field(default_factory=lambda: ([], []))

    @property
    def title(self) -> str:
        """Of which output."""
        return f"classification in two by output {self.output!r}"

    def add(self, batch: Batch) -> None:
        """Take a batch; a label for each entry."""
        shape = (len(batch.rows), -1)
        self.labels.append(np.asarray(batch.labels).reshape(shape).astype(np.float64))
        for held, side in zip(self.sides, (batch.reference, batch.candidate), strict=True):
            held.append(np.asarray(side[self.output], np.float64).reshape(shape))

    def scores(self) -> tuple[Score, ...]:
        """Accuracy (`top1`; probabilities are told by their range) and `auc`."""
        labels = np.concatenate(self.labels)
        before, after = (np.concatenate(s) for s in self.sides)
        threshold = 0.5 if before.min(initial=0.0) >= 0 and before.max(initial=0.0) <= 1 else 0.0
        means = Means()
        means.add(*(((s > threshold) == (labels > 0)).astype(np.float64) for s in (after, before)))
        return means.score("top1", paired=True, share=True), drawn("auc", (labels, before, after), _auc)


def _auc(labels: F64, before: F64, after: F64, side: int) -> float:
    """The share of pairs of a 1 and a 0 that are in order, ties half."""
    one = labels.reshape(-1) > 0
    ones, zeros = int(one.sum()), int((~one).sum())
    if not ones or not zeros:
        return float("nan")
    order = ranks((before, after)[side].reshape(-1))
    return (float(order[one].sum()) - ones * (ones + 1) / 2) / (ones * zeros)
