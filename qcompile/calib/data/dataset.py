"""Data for calibration and evaluation: one `Dataset`, whatever it is read from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.data.readers import Arrays, Reader
from qcompile.errors import DataError
from qcompile.execute.session import SAMPLES
from qcompile.execute.task.embeddings import Pairs
from qcompile.ir.model import InputInfo

HELD_BACK = 8
_LEAST_TO_HOLD_BACK = 16
_LARGEST_SHARE = 4


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples of `reader` at `index`, in this order, checked for NaN and infinity as they are read.

    `names` are the arrays of a batch; `labels` [N] or None; `source` says where the data came from;
    `random` marks made-up data.  `alone`: a sample is all inputs of a run, whose first axes need not be samples; or the model
    takes no two at a time.  `masks` are the inputs that may hold infinities.  `held` are samples of `reader` that are none of
    these: nothing is fitted to them, and figures are measured on them.  `pairs`: samples that somebody compared.
    """

    reader: Reader
    index: tuple[int, ...]
    names: tuple[str, ...]
    source: str
    all_labels: NDArray[Any] | None = None
    random: bool = False
    alone: bool = False
    masks: frozenset[str] = frozenset()
    held: tuple[int, ...] = ()
    pairs: Pairs | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> NDArray[Any] | None:
        """The labels of the samples, in their order."""
        return None if self.all_labels is None else self.all_labels[list(self.index)]

    def batches(self, size: int) -> Iterator[dict[str, NDArray[Any]]]:
        """Batches of at most `size` samples of one shape, in order, the last one shorter.

        Raises:
            DataError: NaN or infinite values (which array, which sample), or an unreadable picture.
        """
        start = 0
        while start < len(self.index):
            stop = self._batch_end(start, size)
            batch = self.reader.read(self.index[start:stop])
            _require_finite(batch, self.index[start:stop], self.source, self.masks)
            yield {**batch, SAMPLES: np.zeros(1, np.int8)} if self.alone else batch
            start = stop

    def run_size(self, inputs: Sequence[InputInfo]) -> int | None:
        """Samples that a model with these `inputs` takes a run, when that is fixed (see `fixed_batch`)."""
        return None if self.alone else fixed_batch(inputs)

    def take(self, n: int) -> Dataset:
        """`n` samples spread evenly over the stored order (stored data is often sorted by class); all when fewer."""
        if n >= len(self):
            return self
        chosen = (np.arange(n) * len(self)) // n
        return replace(self, index=tuple(self.index[i] for i in chosen))

    def split(self, n: int) -> tuple[Dataset, Dataset]:
        """`take(n)` and the rest, e.g. to calibrate and to measure."""
        first = self.take(n)
        held = set(first.index)
        return first, replace(self, index=tuple(i for i in self.index if i not in held))

    def take_pairs(self, n: int) -> Dataset:
        """The samples of n // 2 of the pairs (one at least), spread evenly over their order."""
        assert self.pairs is not None
        wanted = max(1, n // 2)
        rows = self.pairs.rows
        chosen = rows[(np.arange(wanted) * len(rows)) // wanted] if wanted < len(rows) else rows
        return replace(self, index=tuple(int(i) for i in np.unique(chosen)))

    def fitted(self, n: int, run: int = 1) -> Dataset:
        """`take(n)` with up to eight other samples `held` back: of those that are left over, else an eighth of 16 or more.

        `run`: samples that the model takes a run; whole runs are held back, and never more than a quarter of the data for them.
        """
        first, rest = self.split(n)
        few = -(-min(HELD_BACK, len(self) // HELD_BACK) // run) * run
        if len(self) < _LEAST_TO_HOLD_BACK or _LARGEST_SHARE * few > len(self):
            few = 0
        if len(rest) >= max(few, run):
            return replace(first, held=rest.take(max(HELD_BACK, run)).index)
        if not few:
            return first
        held, first = self.split(few)
        return replace(first.take(n), held=held.index)

    @property
    def held_back(self) -> Dataset | None:
        """The samples that nothing is fitted to, if some were held back."""
        return replace(self, index=self.held, held=()) if self.held else None

    def fingerprint(self) -> str:
        """SHA-256 hex digest of the samples' contents and order."""
        return hashlib.sha256(self.reader.digest(self.index)).hexdigest()

    def _batch_end(self, start: int, size: int) -> int:
        if self.alone:
            return start + 1
        key = self.reader.shape_key(self.index[start])
        stop = start + 1
        while stop < min(start + size, len(self.index)) and self.reader.shape_key(self.index[stop]) == key:
            stop += 1
        return stop


def find_beside(model_path: str | Path) -> str | None:
    """Data beside the model by convention: `model.calib.npz` or the folder `model.calib` for `model.onnx`."""
    path = Path(model_path)
    for candidate in (path.with_name(f"{path.stem}.calib.npz"), path.with_name(f"{path.stem}.calib")):
        if candidate.exists():
            return str(candidate)
    return None


def fixed_batch(inputs: Sequence[InputInfo]) -> int | None:
    """Samples that the model takes a run, when its first axis is fixed."""
    sizes = {i.shape[0] for i in inputs if i.shape}
    fixed = [s for s in sizes if isinstance(s, int)]
    return fixed[0] if len(sizes) == 1 and fixed else None


def _require_finite(batch: Arrays, index: Sequence[int], source: str, masks: frozenset[str]) -> None:
    for name, array in batch.items():
        if array.dtype.kind != "f" or np.isfinite(array).all():
            continue
        wrong = np.isnan(array) if name in masks else ~np.isfinite(array)
        if not wrong.any():
            continue
        bad = np.argwhere(wrong)[0]
        what = "NaN" if np.isnan(array[tuple(bad)]) else "an infinite value"
        sample = index[int(bad[0])] if len(bad) else index[0]
        raise DataError(f"{source}: array {name!r} holds {what} in sample {sample}; clean the data or its preprocessing")
