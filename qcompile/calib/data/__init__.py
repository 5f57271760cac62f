"""Samples: what a data set is, and how one is opened."""

from __future__ import annotations

from qcompile.calib.data.dataset import Dataset, find_beside, fixed_batch
from qcompile.calib.data.sources import load_data

__all__ = ["Dataset", "find_beside", "fixed_batch", "load_data"]
