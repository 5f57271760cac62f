"""Samples that nothing is fitted to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from qcompile.calib.data.dataset import Dataset
from qcompile.calib.store.shards import DataSpec
from qcompile.ir.model import Model
from tests.ir import tiny

F32 = np.float32
FIXED = """<ir_version: 9, opset_import: ["" : 17]> g (float[4,3] x) => (float[4,3] y) { y = Relu(x) }"""
STATE = """<ir_version: 9, opset_import: ["" : 17]> g (float[1,3] x, float[2,1,3] h) => (float[2,1,3] y) { y = Add(h, x) }"""
ENDLESS = """
import numpy as np

def endless():
    n = 0
    while True:
        yield np.full((1, 4), n, np.float32)
        n += 1
"""


def model(folder: Path, text: str | None = None) -> Model:
    onnx.save(tiny.linear() if text is None else parser.parse_model(text), folder / "m.onnx")
    return Model.load(folder / "m.onnx")


def opened(folder: Path, stored: int, samples: int | None, cap: int | None = 128, text: str | None = None) -> Dataset:
    np.savez(folder / "d.npz", x=np.arange(stored * 4, dtype=F32).reshape(stored, 4)[:, : 4 if text is None else 3])
    return DataSpec(str(folder / "d.npz"), None, samples, cap).open(model(folder, text))


@pytest.mark.parametrize(
    ("stored", "samples", "fitted", "held"),
    [
        (300, None, 128, 8),  # of those that are left over
        (300, 64, 64, 8),
        (12, 8, 8, 4),
        (9, 8, 8, 1),
        (128, None, 120, 8),  # of the samples themselves
        (129, None, 121, 8),
        (16, None, 14, 2),
        (20, 20, 18, 2),
        (15, None, 15, 0),  # too few
        (4, 4, 4, 0),
    ],
)
def test_how_many(stored: int, samples: int | None, fitted: int, held: int, tmp_path: Path) -> None:
    data = opened(tmp_path, stored, samples)
    assert (len(data), len(data.held)) == (fitted, held)
    assert not set(data.index) & set(data.held)
    kept = data.held_back
    assert (kept is None) == (held == 0)
    assert kept is None or (len(kept) == held and kept.fingerprint() != data.fingerprint())


@pytest.mark.parametrize(("stored", "fitted", "held"), [(64, 56, 8), (16, 12, 4), (15, 15, 0), (12, 12, 0)])
def test_whole_runs_of_a_fixed_batch(stored: int, fitted: int, held: int, tmp_path: Path) -> None:
    data = opened(tmp_path, stored, None, text=FIXED)
    assert (len(data), len(data.held)) == (fitted, held)


def test_run_by_run(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"x": np.ones((24, 3), F32), "h": np.ones((24, 2, 1, 3), F32)}
    np.savez(tmp_path / "d.npz", **arrays)
    data = DataSpec(str(tmp_path / "d.npz")).open(model(tmp_path, STATE))
    kept = data.held_back
    assert data.alone and kept is not None and kept.alone
    assert [f["h"].shape for f in kept.batches(8)] == [(2, 1, 3)] * 3 and len(data) == 21


@pytest.mark.parametrize("spec", ["random", "gen.py:endless"])
def test_what_is_made_as_it_is_read_gives_more(spec: str, tmp_path: Path) -> None:
    (tmp_path / "gen.py").write_text(ENDLESS)
    source = spec if spec == "random" else str(tmp_path / spec)
    data = DataSpec(source, samples=12).open(model(tmp_path))
    assert (len(data), len(data.held)) == (12, 8)


def test_the_samples_that_are_fitted_to_are_those_of_take(tmp_path: Path) -> None:
    data = opened(tmp_path, 300, 64)
    assert data.index == tuple((np.arange(64) * 300) // 64)
