from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qcompile.calib.data.runs import LENGTH
from qcompile.errors import ModelError, UsageError
from qcompile.ir.model import InputInfo
from qcompile.verbs.bench.models import bench, made_up_inputs
from tests.verbs import evaluation_graphs as graphs


def test_the_report_holds_every_model_and_ratios_to_the_first(tmp_path: Path) -> None:
    paths = [graphs.float_model(tmp_path / "a.onnx"), graphs.coarse_model(tmp_path / "b.onnx")]
    seen: list[tuple[int, int]] = []
    result = bench(paths, threads=1, runs=4, progress=lambda done, total: seen.append((done, total))).to_json()
    assert [m["path"] for m in result["models"]] == [str(p) for p in paths]
    assert all(0 < m["min_ms"] <= m["median_ms"] for m in result["models"])
    assert result["ratios"][0] == {"path": str(paths[0]), "median": 1.0, "min": 1.0}
    first, second = result["models"]
    assert result["ratios"][1]["median"] == pytest.approx(first["median_ms"] / second["median_ms"])
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    json.dumps(result, allow_nan=False)


def test_made_up_inputs_have_safe_values_and_shapes() -> None:
    inputs = [
        InputInfo("x", np.dtype(np.float16), ("N", 3, 8, 8)),
        InputInfo("ids", np.dtype(np.int64), ("batch", "sequence")),
        InputInfo("mask", np.dtype(np.bool_), (None, 7)),
        InputInfo("past", np.dtype(np.float32), (2, "batch", 4)),
        InputInfo("state", np.dtype(np.float32), (2, None, 4)),
        InputInfo("rate", np.dtype(np.int64), ()),
    ]
    made = made_up_inputs(inputs)
    assert made["x"].shape == (1, 3, 8, 8) and made["x"].dtype == np.float16
    assert made["ids"].shape == (1, LENGTH) and set(np.unique(made["ids"])) <= {0, 1}
    assert made["mask"].shape == (1, 7) and made["mask"].dtype == np.bool_
    assert made["past"].shape == made["state"].shape == (2, 1, 4) and made["rate"].shape == ()
    assert np.array_equal(made["x"], made_up_inputs(inputs)["x"])


def test_data_and_fixed_batches(tmp_path: Path) -> None:
    path = graphs.float_model(tmp_path / "a.onnx", batch=4)
    data = graphs.dataset(tmp_path / "d.npz", path, 4)
    assert bench([path, graphs.half_model(tmp_path / "h.onnx")], threads=1, runs=1, data=data).runs == 1
    assert bench([path], threads=1, runs=1).runs == 1


def test_wrong_use_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one"):
        bench([])
    with pytest.raises(UsageError, match="one run"):
        bench([graphs.float_model(tmp_path / "a.onnx")], runs=0)
    with pytest.raises(ModelError):
        bench([tmp_path / "missing.onnx"])
