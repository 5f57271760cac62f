"""tools/bench_integer.py: its figures, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.oracle.models import tiny_cnn

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools import bench_integer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, data = tiny_cnn()
    onnx.save(model, tmp_path / "cnn.onnx")
    np.savez(tmp_path / "cnn.calib.npz", **data)  # pyright: ignore[reportArgumentType]
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    np.savez(tmp_path / "broken.calib.npz", x=np.zeros(1))
    return tmp_path


def measured(folder: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["bench_integer.py", "--models", str(folder), *arguments])
    bench_integer.main()
    return capsys.readouterr().out


def test_figures_of_a_model(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(measured(folder, "--json", monkeypatch=monkeypatch, capsys=capsys))["models"]
    row, broken = rows["cnn"], rows["broken"]["error"]
    assert "broken.onnx" in broken
    assert "error" not in row, row
    assert (row["float_tensors"], row["errors"], row["proof_complete"]) == (0, 0, True)
    assert row["oracle"]["samples"] == 12 and row["oracle"]["mismatches"] == 0 and row["oracle"]["matches"] > 0
    assert row["integer"]["sqnr_db"] > 20 and row["qdq"]["sqnr_db"] > 20
    assert row["cost"]["bops"] == 64 * row["cost"]["macs"]
    assert all(found["codes"] > 0 and found["most"] <= 1 for found in row["dyadic"].values()) and "8 bit" in row["dyadic"]


def test_options_change_the_integer_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", "cnn", "--bits", "op:Conv=w4a4", "--passes", "integer{profile=ort-fused}", "--rounded", "2")
    head, _, row = measured(folder, *arguments, monkeypatch=monkeypatch, capsys=capsys).splitlines()
    assert head.count("|") == row.count("|") and "complete" in row and " 0 of " in row
