from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from tests.passes.measures import outputs
from tests.passes.models import built

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools import bench_softmax

MODEL = Path(__file__).parents[2] / "models" / "vit_digits.onnx"


def through(codes: str, bits: int) -> list[np.ndarray]:
    """Probabilities [64, 10], and the same behind their codes."""
    nodes = [helper.make_node("Softmax", ["x"], ["p"], name="softmax", axis=-1), helper.make_node("Mul", ["p", "one"], ["y"])]
    model = built(nodes, ["N", 10], {"one": np.float32(1)})
    feeds = {"x": (np.random.default_rng(0).standard_normal((64, 10)) * 3).astype(np.float32)}
    return [outputs(m, feeds)[0].astype(np.float64) for m in (model, bench_softmax.coded(model, codes, bits, {"p": 0.5}))]


@pytest.mark.parametrize(("codes", "top"), [("uniform [0, 1]", 1.0), ("uniform [0, max]", 0.5)])
def test_uniform_codes_are_the_formula(codes: str, top: float) -> None:
    p, q = through(codes, 4)
    assert np.abs(q - np.minimum(np.rint(p / top * 15), 15) * top / 15).max() < 1e-6


@pytest.mark.parametrize(("codes", "k"), [("log2", 1), ("log-sqrt2", 2)])
def test_logarithmic_codes_are_the_formula(codes: str, k: int) -> None:
    p, q = through(codes, 4)
    code = np.minimum(np.rint(-k * np.log2(np.maximum(p, 1e-30))), 15)
    near = np.abs(-k * np.log2(np.maximum(p, 1e-30)) % 1 - 0.5) < 1e-4
    assert np.abs(q - np.where(code == 15, 0, 2.0 ** (-code / k)))[~near].max() < 1e-6


def test_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("onnx", "eval.npz"):
        shutil.copy(MODEL.with_name(f"vit_digits.{part}"), tmp_path)
    words = ["--models", str(tmp_path), "--model", "vit_digits", "--samples", "4", "--bits", "4"]
    monkeypatch.setattr(sys, "argv", ["bench_softmax.py", *words, "--json"])
    bench_softmax.main()
    found = json.loads(capsys.readouterr().out)["models"]["vit_digits"]
    assert 0 < found["spread"]["lost at 4 bits"] < 1 and 0 < found["spread"]["entropy"] <= 1
    assert found["codes"]["log2, 4 bits"]["sqnr_db"] > found["codes"]["uniform [0, 1], 4 bits"]["sqnr_db"] + 3
