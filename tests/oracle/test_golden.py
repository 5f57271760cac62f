"""Host drift: the shipped integer-only model computes the shipped integers, here and with every setting of ONNX Runtime."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import qcompile
from qcompile.cli import main
from qcompile.oracle.graph import integer_graph
from qcompile.oracle.ranges import prove
from qcompile.oracle.run import decode, encode, run_integer
from qcompile.target.check import check
from tests.oracle.build import SETTINGS, on_ort, on_reference
from tests.oracle.models import MODELS as TINY
from tests.oracle.models import compiled

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
    assert np.array_equal(on_reference(model, {"input": expected["input"]})[0], logits)


@pytest.mark.parametrize("name", TINY)
def test_four_implementations_agree(name: str, tmp_path: Path) -> None:
    """A convolutional net and a transformer block: the oracle, ONNX Runtime with every setting, onnx.reference."""
    path, data = compiled(name, tmp_path)
    model, feeds = onnx.load(path), {key: array[:4] for key, array in data.items()}
    ours = list(decode(model, run_integer(model, encode(model, feeds))).values())
    runs = [on_ort(model, feeds, optimize, threads) for optimize, threads in SETTINGS]
    for theirs in (*runs, on_reference(model, feeds)):
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))


def test_the_manifest_knows_the_golden_model() -> None:
    (entry,) = json.loads((MODELS / "manifest.json").read_text(encoding="utf-8"))["goldens"]
    for described in (entry, entry["expected"]):
        assert hashlib.sha256((MODELS / described["file"]).read_bytes()).hexdigest() == described["sha256"]
    assert (MODELS / entry["file"]) == GOLDEN and entry["bytes"] == GOLDEN.stat().st_size
    assert len(np.load(MODELS / entry["expected"]["file"])["input"]) == entry["expected"]["samples"]


def test_the_golden_model_is_pure_and_proven() -> None:
    model = onnx.load(GOLDEN)
    assert prove(model).complete
    assert [f.rule for f in check(model, "integer")] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["char_gpt", "digits_cnn", "vit_digits"])
def test_shipped_models_are_proven_and_bit_exact(name: str, tmp_path: Path) -> None:
    target = tmp_path / "integer.onnx"
    qcompile.compile(MODELS / f"{name}.onnx", output=target, target="integer", threads=1)
    model = onnx.load(target)
    assert prove(model).complete and [f.to_json() for f in check(model, "integer")] == []
    with np.load(MODELS / f"{name}.eval.npz") as data:
        feeds = {i.name: data[i.name][:2] for i in model.graph.input}
    ours = list(decode(model, run_integer(model, encode(model, feeds))).values())
    for optimize, threads in SETTINGS:
        assert all(np.array_equal(a, b) for a, b in zip(ours, on_ort(model, feeds, optimize, threads), strict=True))


def test_eval_oracle_on_the_golden_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--oracle", str(GOLDEN), "--data", str(MODELS / "digits_cnn.eval.npz"), "--samples", "16"]) == 0
    assert "bit for bit equal on 16 samples" in capsys.readouterr().out


def test_eval_needs_two_models_without_the_oracle(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(GOLDEN), "--data", str(MODELS / "digits_cnn.eval.npz")]) == 2
    assert "--oracle" in capsys.readouterr().err


def test_check_prints_the_proof(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(GOLDEN), "--target", "integer", "--proof"]) == 0
    assert "no overflow is possible" in capsys.readouterr().out
