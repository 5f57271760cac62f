"""Readers: random access to samples, wherever they lie; nothing is decoded before it is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qcompile.calib.data.archive import forget
from qcompile.calib.data.preprocess import Preprocess, prepare, prepare_array
from qcompile.errors import DataError

Arrays = dict[str, NDArray[Any]]


class Reader(Protocol):
    """Samples by index."""

    def __len__(self) -> int: ...
    def read(self, index: Sequence[int]) -> Arrays:
        """The samples as one batch; they all have the same `shape_key`."""
        ...

    def shape_key(self, i: int) -> object:
        """Samples with different keys cannot share a batch."""
        ...

    def digest(self, index: Sequence[int]) -> bytes:
        """A hash of the samples' stored bytes."""
        ...


def digest_of(arrays: Arrays, index: Sequence[int], head: bytes = b"") -> bytes:
    """SHA-256 of `head`, and of names, types, shapes and the rows at `index` of `arrays`."""
    h = hashlib.sha256(head)
    for name, array in sorted(arrays.items()):
        h.update(f"{name}:{array.dtype}:{array.shape[1:]}".encode())
        for i in index:
            h.update(stored_bytes(array[i]))
        forget(array)
    return h.digest()


def stored_bytes(array: NDArray[Any]) -> bytes:
    """The array's bytes; those of objects would be addresses."""
    return np.ascontiguousarray(array, str if np.asarray(array).dtype == object else None).tobytes()


@dataclass(frozen=True, eq=False)
class ArrayReader:
    """Arrays in memory or mapped, first axis = samples; `pictures` names those that are preprocessed as they are read."""

    arrays: Arrays
    dtypes: dict[str, np.dtype[Any]]
    pictures: dict[str, Preprocess]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def read(self, index: Sequence[int]) -> Arrays:
        batch = {name: self._one(name, np.asarray(array[list(index)])) for name, array in self.arrays.items()}
        for array in self.arrays.values():
            forget(array)
        return batch

    def shape_key(self, i: int) -> object:
        return None

    def digest(self, index: Sequence[int]) -> bytes:
        return digest_of(self.arrays, index, repr(sorted(self.pictures.items())).encode())

    def _one(self, name: str, part: NDArray[Any]) -> NDArray[Any]:
        if name in self.pictures:
            return prepare_array(part, self.pictures[name], self.dtypes[name])
        return np.ascontiguousarray(part, self.dtypes[name])


@dataclass(frozen=True, eq=False)
class ImageReader:
    """Picture files for one input."""

    name: str
    dtype: np.dtype[Any]
    files: tuple[Path, ...]
    preprocess: Preprocess

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: Sequence[int]) -> Arrays:
        return {self.name: np.stack([self._one(self.files[i]) for i in index])}

    def shape_key(self, i: int) -> object:
        return None

    def digest(self, index: Sequence[int]) -> bytes:
        h = hashlib.sha256(repr(self.preprocess).encode())
        for i in index:
            h.update(hashlib.sha256(self.files[i].read_bytes()).digest())
        return h.digest()

    def _one(self, file: Path) -> NDArray[Any]:
        try:
            with Image.open(file) as picture:
                return prepare(picture, self.preprocess, self.dtype)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise DataError(f"cannot read the picture {file}: {e}; remove it or replace it") from e


@dataclass(frozen=True, eq=False)
class FeedReader:
    """Samples of possibly different shapes, each a dict of arrays with a leading axis of 1 (rank-0 inputs: none)."""

    feeds: tuple[Arrays, ...]

    def __len__(self) -> int:
        return len(self.feeds)

    def read(self, index: Sequence[int]) -> Arrays:
        parts = [self.feeds[i] for i in index]
        return {n: np.concatenate([p[n] for p in parts]) if parts[0][n].ndim else parts[0][n] for n in parts[0]}

    def shape_key(self, i: int) -> object:
        # A rank-0 input holds for a whole run: only equal values may share one.
        return tuple((n, a.shape[1:] if a.ndim else a.item()) for n, a in sorted(self.feeds[i].items()))

    def digest(self, index: Sequence[int]) -> bytes:
        h = hashlib.sha256()
        for i in index:
            for name, array in sorted(self.feeds[i].items()):
                h.update(f"{name}:{array.dtype}:{array.shape}".encode())
                h.update(stored_bytes(array))
        return h.digest()
