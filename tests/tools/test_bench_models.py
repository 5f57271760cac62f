"""What tools/bench_models.py and tools/bench_detect.py count as a fault, and as a detection found again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_detect
import bench_models
import zoo

from qcompile.calib.data.dataset import Dataset
from qcompile.calib.data.readers import ArrayReader

GOOD = {"target": "rtx", "rc": 0, "loads": True, "printed_db": 31.3, "said_db": 31.0, "own_db": 31.2, "fast_db": 20.0}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"said_db": 20.1}, ["eval differs"]),
        ({"target": "ort", "said_db": 20.1, "printed_db": 20.1}, []),  # true of a default session
        ({"printed_db": 25.0}, ["false figure"]),
        ({"printed_db": None}, []),  # measured on other runs
        ({"printed_db": 107.0, "own_db": 66.0, "said_db": 61.0}, []),
        ({"said_db": None}, ["no figure"]),
        ({"static_db": 32.0}, ["below quantize_static"]),
        ({"static_db": "fails: ValueError"}, []),
        ({"loads": False}, ["does not load"]),
        ({"built": "no"}, ["no engine"]),
        ({"built": "float too"}, []),
        ({"built": "yes"}, ["no audit"]),
        ({"rc": 3}, ["exit 3"]),
        ({"rc": 3, "message": "error: nothing in the model can be quantized to w8a8"}, []),
    ],
)
def test_faults(change: dict[str, Any], expected: list[str]) -> None:
    assert bench_models.faults(GOOD | change) == expected


@pytest.mark.parametrize(
    ("declared", "made", "real", "same"),
    [
        ([1, "N"], [1, "N"], (1, 4), True),
        ([1, "N"], [1, 4], (1, 4), False),
        ([1, "N"], ["d0", "N"], (1, 4), False),
        ([None, "N"], ["d0", "N"], (1, 4), True),
        (["N", 4], ["d0", 4], (1, 4), False),
        (["?", "?"], [None, None], (1, 4), True),
        ([], ["d0", 2], (1, 2), True),  # a wrong declaration was dropped
        ([3, 2], ["d0", 2], (1, 2), True),
        ([3, 2], ["d0", 5], (1, 2), False),
    ],
)
def test_the_interface_holds_shapes(declared: list[Any], made: list[Any], real: tuple[int, ...], same: bool) -> None:
    source, other = [("y", "tensor(float)", declared)], [("y", "tensor(float)", made)]
    assert (bench_models.differing(source, other, [real]) == "") == same
    assert bench_models.differing(source, [("z", "tensor(float)", declared)], [real])


def test_the_judging_runs_are_those_that_the_product_holds_back() -> None:
    runs = [{"x": np.full((1, 2), i, np.float32)} for i in range(24)]
    fitted, held = bench_models.split(runs)
    x = np.concatenate([r["x"] for r in runs])
    data = Dataset(ArrayReader({"x": x}, {"x": x.dtype}, {}), tuple(range(24)), ("x",), "here").fitted(len(fitted))
    assert [int(r["x"][0, 0]) for r in held] == list(data.held) and len(data) == 16


def test_the_worst_output_counts() -> None:
    x = np.ones(100, np.float32)
    wanted, got = [[x, x, np.arange(3)]], [[x + 0.01, x + 0.1, np.arange(3)]]
    assert bench_models.worst_db(wanted, got) == pytest.approx(20, abs=0.01)


def test_runs_are_saved_as_the_data_guide_says(tmp_path: Path) -> None:
    runs = [{"x": np.zeros((1, 3, 4)), "state": np.zeros((2, 1))}] * 5
    bench_models.save(tmp_path / "both.npz", runs)
    bench_models.save(tmp_path / "alone.npz", [{"x": r["x"]} for r in runs])
    assert np.load(tmp_path / "both.npz")["state"].shape == (5, 2, 1) and np.load(tmp_path / "alone.npz")["x"].shape == (5, 3, 4)


def test_detections_found_again() -> None:
    boxes = np.array([[0, 0, 10, 10], [20, 20, 40, 40]], np.float64)
    wanted = boxes, np.array([0.9, 0.5]), np.array([0, 1])
    moved = boxes + np.array([[1, 0, 1, 0], [0, 0, 0, 0]]), np.array([0.8, 0.5]), np.array([0, 2])
    found = bench_detect.compared([wanted], [moved])
    assert (found["objects"], found["found"]) == (2, 0.5) and found["score"] == pytest.approx(0.1)
    assert found["overlap"] == pytest.approx(90 / 110)


def test_every_model_of_the_zoo_has_inputs_that_can_be_filled() -> None:
    rng = np.random.default_rng(0)
    for entry in zoo.entries():
        for spec in entry.inputs.values():
            if max(spec["shape"], default=0) <= 96:
                assert zoo.filled(spec, rng, None, 0).shape == tuple(spec["shape"])
