"""Host drift: the shipped integer-only model computes the shipped integers, here and with every setting of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompile.cli import main
from qcompile.oracle.graph import integer_graph
from qcompile.oracle.ranges import prove
from qcompile.oracle.run import decode, encode, run_integer
from qcompile.target.rules import check
from tests.oracle.build import SETTINGS, on_ort

MODELS = Path(__file__).parents[2] / "models"
GOLDEN = MODELS / "digits_cnn.integer.onnx"


def test_the_golden_model_computes_its_integers() -> None:
    model, expected = onnx.load(GOLDEN), np.load(MODELS / "digits_cnn.integer.expected.npz")
    graph = integer_graph(model)
    codes = encode(graph, {"input": expected["input"]})
    assert np.array_equal(codes[graph.sources[0]], expected["codes"])
    made = run_integer(graph, codes)
    assert np.array_equal(made[graph.results[0]], expected["result"]) and made[graph.results[0]].dtype == expected["result"].dtype
    (logits,) = decode(graph, made).values()
    for optimize, threads in SETTINGS:
        assert np.array_equal(on_ort(model, {"input": expected["input"]}, optimize, threads)[0], logits)


def test_the_golden_model_is_pure_and_proven() -> None:
    model = onnx.load(GOLDEN)
    assert prove(model).complete
    assert [f.rule for f in check(model, "integer")] == []


def test_eval_oracle_on_the_golden_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--oracle", str(GOLDEN), "--data", str(MODELS / "digits_cnn.eval.npz"), "--samples", "16"]) == 0
    assert "bit for bit equal on 16 samples" in capsys.readouterr().out


def test_eval_needs_two_models_without_the_oracle(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(GOLDEN), "--data", str(MODELS / "digits_cnn.eval.npz")]) == 2
    assert "--oracle" in capsys.readouterr().err


def test_check_prints_the_proof(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(GOLDEN), "--target", "integer", "--proof"]) == 0
    assert "no overflow is possible" in capsys.readouterr().out
