"""Batches made to fit a session: element types, and a last batch that does not fill a fixed batch axis."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qcompile.execute.session import batch_length, run

Feeds = dict[str, NDArray[Any]]

NUMPY_OF: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(ml_dtypes.bfloat16),
    "tensor(double)": np.dtype(np.float64),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(int16)": np.dtype(np.int16),
    "tensor(int8)": np.dtype(np.int8),
    "tensor(uint64)": np.dtype(np.uint64),
    "tensor(uint32)": np.dtype(np.uint32),
    "tensor(uint16)": np.dtype(np.uint16),
    "tensor(uint8)": np.dtype(np.uint8),
    "tensor(bool)": np.dtype(np.bool_),
}


def cast_feeds(session: ort.InferenceSession, feeds: Feeds) -> Feeds:
    """The arrays that `session` takes, in its inputs' element types; the others are left out."""
    wanted = {i.name: NUMPY_OF.get(i.type) for i in session.get_inputs()}
    return {k: v if wanted[k] is None else np.ascontiguousarray(v, wanted[k]) for k, v in feeds.items() if k in wanted}


def pad_batch(feeds: Feeds, size: int) -> Feeds:
    """Repeat the last sample until the batch holds `size`."""
    missing = size - batch_length(feeds)
    return {k: np.concatenate([v, np.repeat(v[-1:], missing, 0)]) if v.ndim else v for k, v in feeds.items()}


def run_padded(
    session: ort.InferenceSession, feeds: Feeds, fixed: int | None, first_sample: int, outputs: list[str] | None = None
) -> list[NDArray[Any]]:
    """One run; a batch shorter than `fixed` is padded, and the outputs are cut again.

    Raises:
        InputError: ONNX Runtime fails; the message names the batch's first sample.
    """
    held = batch_length(feeds)
    if fixed is None or held == fixed:
        return run(session, cast_feeds(session, feeds), outputs, first_sample)
    found = run(session, cast_feeds(session, pad_batch(feeds, fixed)), outputs, first_sample)
    return [o[:held] if o.ndim and o.shape[0] == fixed else o for o in found]
