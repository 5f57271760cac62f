"""Inputs whose first axis is not the samples: states, edges, time steps, scalars.  One sample is then all inputs of one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.data.archive import forget
from qcompile.calib.data.readers import Arrays, digest_of
from qcompile.errors import DataError
from qcompile.ir.model import InputInfo

LENGTH = 32  # of a dynamic axis of made-up data
BATCH_NAMES = frozenset({"n", "b", "batch", "batch_size", "bs"})


@dataclass(frozen=True, eq=False)
class RunReader:
    """`arrays[name][i]` is the whole input of run number i."""

    arrays: Arrays
    dtypes: dict[str, np.dtype[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def read(self, index: Sequence[int]) -> Arrays:
        (i,) = index
        found = {n: np.array(a[i], self.dtypes[n], order="C") for n, a in self.arrays.items()}
        for array in self.arrays.values():
            forget(array)
        return found

    def shape_key(self, i: int) -> object:
        return None

    def digest(self, index: Sequence[int]) -> bytes:
        return digest_of(self.arrays, index)


def ranked(inputs: Sequence[InputInfo], arrays: Arrays) -> list[InputInfo]:
    """An input of unknown rank has that of its array, whose first axis are the samples."""
    return [
        i if i.ranked or i.name not in arrays else replace(i, shape=(None,) * np.ndim(arrays[i.name]), ranked=True)
        for i in inputs
    ]


def with_unread(inputs: Sequence[InputInfo], arrays: Arrays) -> Arrays:
    """Zeros for the inputs that nothing in the model reads, where the data lacks them: ONNX Runtime asks for all inputs."""
    lacking = [i for i in inputs if not i.read and i.name not in arrays]
    if not lacking:
        return arrays
    rows = max((len(a) for a in arrays.values() if np.ndim(a)), default=1)
    return arrays | {i.name: np.zeros(_unread_shape(i, rows), i.dtype) for i in lacking}


def _unread_shape(info: InputInfo, rows: int) -> list[int]:
    first = [d if isinstance(d, int) else rows for d in info.shape[:1]]
    return first + [d if isinstance(d, int) else 1 for d in info.shape[1:]]


def are_samples(inputs: Sequence[InputInfo], arrays: Arrays) -> bool:
    """Whether the first axis of every array are the samples, as many a run as the caller likes, or as the model takes of each."""
    same_rank = all(i.shape and np.ndim(arrays[i.name]) == len(i.shape) for i in inputs)
    return same_rank and len(first_axes(inputs)) == 1


def as_runs(inputs: Sequence[InputInfo], arrays: Arrays, source: str) -> Arrays:
    """{name: [runs, *shape]} of stored arrays.

    An array with one axis more than its input holds a run a row; one of the input's rank holds, one after the other, as many rows
    a run as the input's first axis says (one where it is dynamic).  What suffices for a single run is used in all.

    Raises:
        DataError: an array is none of this, or the arrays hold different numbers of runs.
    """
    made = {i.name: _runs(i, np.asanyarray(arrays[i.name]), source) for i in inputs}
    counts = {n: len(a) for n, a in made.items()}
    runs = max(counts.values(), default=0)
    if odd := {n: c for n, c in counts.items() if c not in (1, runs)}:
        raise DataError(
            f"{source}: the arrays hold different numbers of runs ({counts}; {', '.join(odd)}: give {runs}, or one for all);"
            " give each array an axis of samples in front of the input's own"
        )
    return {n: a if len(a) == runs else np.broadcast_to(a, (runs, *a.shape[1:])) for n, a in made.items()}


def _runs(info: InputInfo, array: NDArray[Any], source: str) -> NDArray[Any]:
    if array.ndim == len(info.shape) + 1 and _fits(info.shape, array.shape[1:]):
        return array
    if array.ndim == len(info.shape) and _fits(info.shape[1:], array.shape[1:]):
        rows = next((d if isinstance(d, int) else 1 for d in info.shape[:1]), None)
        if rows is None:
            return array[None]
        if rows and len(array) and len(array) % rows == 0:
            return array.reshape(len(array) // rows, rows, *array.shape[1:])
    shown = ", ".join(map(str, info.shape))
    raise DataError(
        f"{source}: array {info.name!r} has shape {list(array.shape)}, the model needs [{shown}] a run; give [samples, {shown}]"
    )


def is_run(inputs: Sequence[InputInfo], feed: Arrays) -> bool:
    """Whether a feed is one run as it stands: every shape is the input's, and the first axes do not all count samples."""
    if not all(np.ndim(feed[i.name]) == len(i.shape) and _fits(i.shape, np.shape(feed[i.name])) for i in inputs):
        return False
    sizes = {(d, n) for i in inputs for d, n in zip(i.shape, feed[i.name].shape, strict=True) if isinstance(d, str)}
    if len(sizes) > len({name for name, _ in sizes}):
        return False
    rows = {len(feed[i.name]) for i in inputs if i.shape}
    return len(rows) > 1 or (len(first_axes(inputs)) > 1 and rows != {1})


def first_axes(inputs: Sequence[InputInfo]) -> set[int | None]:
    """The first dimensions of the inputs that have one, None for a dynamic one."""
    return {i.shape[0] if isinstance(i.shape[0], int) else None for i in inputs if i.shape}


def _fits(wanted: Sequence[int | str | None], have: Sequence[int]) -> bool:
    return len(wanted) == len(have) and all(not isinstance(w, int) or w == h for w, h in zip(wanted, have, strict=True))


def made_up_shapes(inputs: Sequence[InputInfo]) -> dict[str, list[int]]:
    """Shapes of one run of made-up data: a dynamic first axis is 1, and so are the axes that have its name, or one of
    `BATCH_NAMES`, or none behind a fixed first axis (the batch of a state); others are 32."""
    batches = {i.shape[0] for i in inputs if i.shape and isinstance(i.shape[0], str)}

    def size(shape: Sequence[int | str | None], axis: int) -> int:
        dim = shape[axis]
        if isinstance(dim, int):
            return dim
        named = dim in batches or str(dim).lower() in BATCH_NAMES
        return 1 if axis == 0 or named or (dim is None and axis == 1 and isinstance(shape[0], int)) else LENGTH

    return {i.name: [size(i.shape, k) for k in range(len(i.shape))] for i in inputs}
