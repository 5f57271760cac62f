"""Classification: top-1, top-5 and negative log likelihood against labels, and agreement with the float model."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import DataError
from qcompile.execute.metrics import log_probabilities
from qcompile.execute.task.metric import Batch, rows_of, shaped
from qcompile.execute.task.score import F64, Means, Score

IGNORED = -100
_MANY = 5


@dataclass
class Classification:
    """Logits or probabilities with the classes on `axis` of `output`; labels of the other axes' shape.  -100: no label."""

    output: str
    axis: int = -1
    means: dict[str, Means] = field(default_factory=dict[str, Means])
    labelled: bool = False

    @property
    def title(self) -> str:
        """Of which output."""
        return f"classification by output {self.output!r}"

    def add(self, batch: Batch) -> None:
        """Take a batch.

        Raises:
            DataError: labels that are no classes.
        """
        before, after = (rows_of(side[self.output], self.axis) for side in (batch.reference, batch.candidate))
        if batch.labels is not None:
            self.labelled = True
            self._add_labels(before, after, shaped(batch.labels, before.shape[:-1], self.output).astype(np.int64))
        self._mean("agreement", (before.argmax(-1) == after.argmax(-1)).astype(np.float64))

    def _add_labels(self, before: F64, after: F64, labels: NDArray[np.int64]) -> None:
        kept = labels != IGNORED
        _require_classes(labels[kept], before.shape[-1])
        at, counts = np.where(kept, labels, 0)[..., None], kept.astype(np.float64)
        for name, judge in (("top1", _first), ("top5", _among), ("nll", _surprise)):
            if name != "top5" or before.shape[-1] > _MANY:
                self._mean(name, judge(after, at), judge(before, at), counts)

    def _mean(self, name: str, after: F64, before: F64 | None = None, counts: F64 | None = None) -> None:
        self.means.setdefault(name, Means()).add(after, before, counts)

    def scores(self) -> tuple[Score, ...]:
        """top1, top5 (of more than five classes) and nll with labels; agreement."""
        paired = [n for n in ("top1", "top5") if n in self.means]
        found = [self.means[n].score(n, paired=True, share=True) for n in paired]
        found += [self.means["nll"].score("nll", paired=True, better="lower")] if "nll" in self.means else []
        return (*found, self.means["agreement"].score("agreement", paired=False, share=True))


def _require_classes(labels: NDArray[np.int64], classes: int) -> None:
    if labels.size and (labels.min() < 0 or labels.max() >= classes):
        raise DataError(
            f"the labels hold {labels.min()}..{labels.max()} and the output has {classes} classes;"
            f" fix the labels ({IGNORED} where there is none)"
        )


def _first(rows: F64, at: NDArray[np.int64]) -> F64:
    return (rows.argmax(-1, keepdims=True) == at)[..., 0].astype(np.float64)


def _among(rows: F64, at: NDArray[np.int64]) -> F64:
    """Whether fewer than five classes stand before the label's, those of the same value by their order."""
    own, index = np.take_along_axis(rows, at, -1), np.arange(rows.shape[-1])
    return (((rows > own) | ((rows == own) & (index < at))).sum(-1) < _MANY).astype(np.float64)


def _surprise(rows: F64, at: NDArray[np.int64]) -> F64:
    flat = log_probabilities(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)
    return -np.take_along_axis(flat, at, -1)[..., 0]
