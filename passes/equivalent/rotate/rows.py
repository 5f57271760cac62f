"""Sampled rows of what is rotated, where the rotation depends on data."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe import Probe, Rows, RowsStat
from qcompile.calib.observe.change import FOLD_ROWS
from qcompile.pipeline.base import PassContext

F64 = NDArray[np.float64]


def probe(value: ir.Value) -> Probe[RowsStat]:
    """Rows [k, channels] of a tensor."""
    return Rows(FOLD_ROWS).of(value)


def rows_of(value: ir.Value, ctx: PassContext) -> F64 | None:
    """The rows of a tensor, if they were asked for and there are any."""
    stat = ctx.told.get(probe(value))
    return stat.rows.astype(np.float64) if stat is not None and len(stat.rows) else None


def moment(rows: F64) -> F64:
    """X^T X."""
    return rows.T @ rows
