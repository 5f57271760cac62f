from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.verbs import evaluation_graphs as graphs

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools import bench_passes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = graphs.float_model(tmp_path / "tiny.onnx")
    for part in ("calib", "eval"):
        graphs.dataset(tmp_path / f"tiny.{part}.npz", path, 8)
    return tmp_path


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    base = [
        "bench_passes.py",
        "--models",
        str(folder),
        "--scheme",
        "w8a8",
        "--variant",
        "plain",
        "--samples",
        "8",
        "--target",
        "ort",
    ]
    monkeypatch.setattr(sys, "argv", [*base, *words])
    bench_passes.main()
    return capsys.readouterr().out


def test_cells_are_measured_stored_and_not_run_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--pipeline", "none", "--pipeline", "smooth", "--cells", str(folder / "cells.json"))
    document = json.loads(run(folder, monkeypatch, capsys, *words, "--json"))
    assert set(document["cells"]) == {"tiny/plain/w8a8/none", "tiny/plain/w8a8/smooth"}
    assert all(c["sqnr_db"] > 10 and c["samples"] == 8 for c in document["cells"].values())
    monkeypatch.setattr(bench_passes, "run", lambda *_: pytest.fail("a stored cell ran again"))
    assert "best on calibration data" in run(folder, monkeypatch, capsys, *words)


def test_a_cell_that_fails_holds_the_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "tiny.eval.npz").write_bytes(b"nothing")
    (cell,) = json.loads(run(folder, monkeypatch, capsys, "--pipeline", "none", "--json"))["cells"].values()
    assert "tiny.eval.npz" in cell["error"] and "sqnr_db" not in cell
    assert "tiny.eval.npz" in run(folder, monkeypatch, capsys, "--pipeline", "none")


def test_equal_files_are_evaluated_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, real = [], bench_passes.judged
    monkeypatch.setattr(bench_passes, "judged", lambda *a: calls.append(a) or real(*a))
    cells = json.loads(run(folder, monkeypatch, capsys, "--pipeline", "none", "--pipeline", "split-shortcut", "--json"))["cells"]
    first, second = cells.values()
    assert len(calls) == 1 and first["sqnr_db"] == second["sqnr_db"] and second["passes"] == "split-shortcut"


def test_pairs_are_ranked(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(folder / "tiny.pairs.npy", np.arange(4.0))
    (cell,) = json.loads(run(folder, monkeypatch, capsys, "--pipeline", "none", "--float-rest", "--json"))["cells"].values()
    assert "error" not in cell, cell["error"]
    assert -1 <= cell["metrics"]["spearman"] <= 1 and cell["samples"] == 8
    assert np.array_equal(bench_passes.ranks(np.array([3.0, 1.0, 3.0])), [2.5, 1.0, 2.5])
