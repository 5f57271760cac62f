"""Random data, for a model's shapes and types."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.data.archive import require_room
from qcompile.calib.data.dataset import Dataset, fixed_batch
from qcompile.calib.data.readers import ArrayReader
from qcompile.calib.data.runs import LENGTH, RunReader, first_axes, made_up_shapes
from qcompile.errors import DataError
from qcompile.ir.model import InputInfo

RANDOM_SAMPLES = 32


def random_data(inputs: Sequence[InputInfo], samples: int, seed: int) -> Dataset:
    """Standard normal floats and 0/1 integers (masks: 1); dynamic axes other than the batch get 32.

    Raises:
        DataError: an input has no shape, or the samples take more than half of the machine's memory.
    """
    unknown = [i.name for i in inputs if not i.ranked]
    if unknown:
        raise DataError(f"input {unknown[0]!r} has no shape in the file, so that no data can be made up; give real data")
    samples, alone = max(samples, fixed_batch(inputs) or 1), len(first_axes(inputs)) > 1 or not all(i.shape for i in inputs)
    shapes = (
        made_up_shapes(inputs) if alone else {i.name: [d if isinstance(d, int) else LENGTH for d in i.shape[1:]] for i in inputs}
    )
    size = sum(8 * samples * math.prod(shape) for shape in shapes.values())  # what making them takes
    what = f"{samples:,} random samples of this model take {size:,} bytes"
    require_room(size, what, "give fewer --samples, or smaller shapes")
    rng, dtypes = np.random.default_rng(seed), {i.name: i.dtype for i in inputs}
    arrays = {i.name: _random_array(i, (samples, *shapes[i.name]), rng) for i in inputs}
    reader = RunReader(arrays, dtypes) if alone else ArrayReader(arrays, dtypes, {})
    return Dataset(reader, tuple(range(samples)), tuple(arrays), "random", random=True, alone=alone)


def _random_array(info: InputInfo, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    if info.dtype.kind in "fV":
        return rng.standard_normal(shape, np.float32).astype(info.dtype)
    if info.dtype.kind == "O":
        return np.full(shape, "", object)
    if "mask" in info.name:
        return np.ones(shape, info.dtype)
    return rng.integers(0, 2, shape).astype(info.dtype)
