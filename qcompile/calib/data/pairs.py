"""Pairs of samples in stored data, and how alike they are said to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import DataError
from qcompile.execute.task.embeddings import Pairs

PAIRS = ("pairs", "scores", "score")


def pairs_of(arrays: Mapping[str, NDArray[Any]], samples: int, source: str) -> Pairs | None:
    """Arrays `pairs` [P, 2] (numbers of samples) and `scores` or `score` [P]; without `pairs` samples 2i and 2i + 1 are pair i,
    where there are twice as many samples as scores.

    Raises:
        DataError: pairs without scores, of another number, or of samples that there are not.
    """
    scores, pairs = arrays.get("scores", arrays.get("score")), arrays.get("pairs")
    if scores is None and pairs is None:
        return None
    if pairs is None:
        fits = scores is not None and scores.ndim == 1 and 2 * len(scores) == samples and scores.dtype.kind in "fiu"
        return Pairs(np.arange(samples).reshape(-1, 2), np.asarray(scores, np.float64)) if fits else None
    if scores is None or scores.ndim != 1 or pairs.shape != (len(scores), 2) or pairs.dtype.kind not in "iu":
        shown = "no scores" if scores is None else f"scores of shape {list(scores.shape)}"
        raise DataError(
            f"{source}: the array 'pairs' is {pairs.dtype} {list(pairs.shape)} beside {shown};"
            " give integers [P, 2] and 'scores' [P]"
        )
    if pairs.size and (pairs.min() < 0 or pairs.max() >= samples):
        raise DataError(f"{source}: 'pairs' names the samples {pairs.min()}..{pairs.max()} of {samples}; count them from 0")
    return Pairs(np.asarray(pairs, np.intp), np.asarray(scores, np.float64))
