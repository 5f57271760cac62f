"""What a metric is: it takes runs of both models, batch after batch, and says its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import DataError
from qcompile.execute.task.score import Score

Array = NDArray[Any]


@dataclass(frozen=True)
class Batch:
    """Runs of both models on the same samples.

    `reference`, `candidate`: their outputs by the reference's names.  `rows`: the numbers of the samples in the stored data.
    `labels`: [n, ...] of these samples.
    """

    reference: Mapping[str, Array]
    candidate: Mapping[str, Array]
    rows: Sequence[int]
    labels: Array | None = None
    inputs: Mapping[str, Array] = field(default_factory=dict[str, Array])


class Metric(Protocol):
    """One measure of a task; an object measures once."""

    @property
    def title(self) -> str:
        """What it measures, of what."""
        ...

    def add(self, batch: Batch) -> None:
        """Take a batch.

        Raises:
            DataError: the outputs or the labels are not what it measures.
        """
        ...

    def scores(self) -> tuple[Score, ...]:
        """What was found, the main figure first.

        Raises:
            DataError: nothing can be said of what it was given.
        """
        ...


def shaped(labels: Array, shape: Sequence[int], output: str) -> Array:
    """The labels in the shape that the output asks for.

    Raises:
        DataError: they are more or fewer.
    """
    if labels.size != np.prod(shape):
        raise DataError(
            f"labels of shape {list(labels.shape)} do not fit output {output!r}, which asks for {list(shape)}; correct them"
        )
    return labels.reshape(shape)


def rows_of(output: Array, axis: int = -1) -> NDArray[np.float64]:
    """[n, ..., C] with `axis` last, in float64."""
    return np.moveaxis(np.asarray(output, np.float64), axis, -1)
