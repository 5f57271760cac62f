"""Models that take no two samples at a time, although their batch axis is dynamic: Reshapes and states frozen at one sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.data.dataset import Dataset
from qcompile.errors import InputError
from qcompile.execute.emulate.runnable import runnable
from qcompile.execute.opening import open_model
from qcompile.execute.session import SAMPLES, batch_length, run
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array, input_at

_RECURRENT = ("LSTM", "GRU", "RNN")
_TOLERANCE = 1e-2


def suited(data: Dataset, model: Model) -> Dataset:
    """`data`, one sample a run where `model` answers two samples at a time with an error, or with something else."""
    if data.alone or data.run_size(model.inputs()) is not None or not any(_frozen(n) for n in model.graph.all_nodes()):
        return data
    pair = next(data.take(2).batches(2), None)
    if pair is None or batch_length(pair) < 2 or not _joins(pair):
        return data
    return data if _same(model, pair) else replace(data, alone=True)


def _joins(pair: dict[str, NDArray[Any]]) -> bool:
    return all(a.ndim and len(a) == 2 for a in pair.values())


def _frozen(node: ir.Node) -> bool:
    """Whether a node may hold a batch of one: a constant shape that begins with 1, a constant that is joined, a first state."""
    if node.op_type in ("Reshape", "Expand"):
        shape = const_array(input_at(node, 1))
        return shape is not None and shape.size > 1 and int(shape.reshape(-1)[0]) == 1
    if node.op_type == "Concat":
        arrays = [const_array(v) for v in node.inputs]
        return any(a is not None and a.ndim > 1 for a in arrays)
    return node.op_type in _RECURRENT


def _same(model: Model, pair: dict[str, NDArray[Any]]) -> bool:
    """Whether two samples together give what each gives alone."""
    session = open_model(runnable(model), exact=True)
    given = {k: v for k, v in pair.items() if k != SAMPLES}
    singles = [run(session, {k: v[i : i + 1] for k, v in given.items()}) for i in range(2)]
    try:
        both = run(session, given)
    except InputError:
        return False
    return all(_agree(b, a0, a1) for b, a0, a1 in zip(both, *singles, strict=True))


def _agree(both: NDArray[Any], *singles: NDArray[Any]) -> bool:
    """An output without a batch axis tells nothing."""
    if not both.ndim or both.shape[1:] != singles[0].shape[1:] or len(both) != 2 * len(singles[0]):
        return both.shape == singles[0].shape or both.dtype.kind != "f"
    if both.dtype.kind != "f":
        return True
    expected = np.concatenate(singles).astype(np.float64)
    size = float(np.abs(expected).max(initial=0.0, where=np.isfinite(expected))) or 1.0
    return bool(np.allclose(both, expected, rtol=0, atol=_TOLERANCE * size, equal_nan=True))
