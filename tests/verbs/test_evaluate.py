from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from qcompile.cli import main
from qcompile.errors import DataError, ModelError
from qcompile.execute import metrics
from qcompile.report import SILENT
from qcompile.verbs.evaluate.outputs import evaluate
from qcompile.verbs.evaluate.run import EvalOptions
from qcompile.verbs.evaluate.run import run as evaluated
from qcompile.verbs.options import options_of
from tests.verbs import evaluation_graphs as graphs

KEYS = {
    "schema_version",
    "reference",
    "candidate",
    "samples",
    "sqnr_db",
    "cosine",
    "relative_error",
    "agreement",
    "kl",
    "outputs",
    "tasks",
}


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return graphs.float_model(tmp_path / "float.onnx")


def run(path: Path, x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0])


def test_a_model_against_itself(tmp_path: Path, reference: Path) -> None:
    result = evaluate(reference, reference, graphs.dataset(tmp_path / "d.npz", reference)).to_json()
    assert set(result) == KEYS
    assert (result["agreement"], result["kl"], result["sqnr_db"], result["samples"]) == (1.0, 0.0, metrics.MAX_SQNR_DB, 20)
    assert result["cosine"] == pytest.approx(1.0)
    assert "top1" not in result["candidate"] and result["candidate"]["path"] == str(reference)
    json.dumps(result, allow_nan=False)


def test_a_models_size_counts_its_data_file(tmp_path: Path, reference: Path) -> None:
    apart = tmp_path / "apart.onnx"
    onnx.save(onnx.load(reference), apart, save_as_external_data=True, location="apart.data", size_threshold=0)
    result = evaluate(reference, apart, graphs.dataset(tmp_path / "d.npz", reference)).to_json()
    size = apart.stat().st_size + (tmp_path / "apart.data").stat().st_size
    assert result["candidate"]["size_mb"] == round(size / 1e6, 3)


def test_metrics_are_those_of_the_whole_data(tmp_path: Path, reference: Path) -> None:
    labels = np.random.default_rng(2).integers(0, graphs.CLASSES, 37)
    candidate = graphs.coarse_model(tmp_path / "coarse.onnx")
    data = graphs.dataset(tmp_path / "d.npz", reference, 37, labels)
    seen: list[tuple[int, int]] = []
    result = evaluate(reference, candidate, data, progress=lambda done, total: seen.append((done, total))).to_json()
    x = np.concatenate([b["x"] for b in data.batches(37)])
    r, c = run(reference, x), run(candidate, x)
    assert result["sqnr_db"] == pytest.approx(metrics.sqnr_db(r, c), rel=1e-3)
    assert result["kl"] == pytest.approx(metrics.kl(r, c), rel=1e-3)
    assert result["agreement"] == metrics.agreement(r, c)
    assert result["reference"]["top1"] == (r.argmax(-1) == labels).mean()
    nll = -metrics.log_probabilities(c.astype(np.float64))[np.arange(37), labels].mean()
    assert result["candidate"]["nll"] == pytest.approx(nll, rel=1e-4)
    assert seen == [(16, 37), (32, 37), (37, 37)]


def test_real_valued_labels_give_the_squared_error(tmp_path: Path, reference: Path) -> None:
    labels = np.zeros((20, graphs.CLASSES), np.float32)
    result = evaluate(reference, reference, graphs.dataset(tmp_path / "d.npz", reference, labels=labels)).to_json()
    assert result["reference"]["mse"] > 0 and "top1" not in result["reference"]


@pytest.mark.parametrize(
    ("arrays", "pairs"), [({"score": np.arange(10.0)}, 10), ({"pairs": [[0, 3], [1, 2]], "scores": [1, 2]}, 2)]
)
def test_pairs_and_their_scores_are_ranked(tmp_path: Path, reference: Path, arrays: dict[str, Any], pairs: int) -> None:
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(1).standard_normal((20, graphs.DIM)).astype(np.float32), **arrays)
    options = EvalOptions(data=str(tmp_path / "d.npz"))
    found = evaluated(reference, graphs.coarse_model(tmp_path / "c.onnx"), options, SILENT).to_json()
    spearman = found["tasks"][0]["scores"][0]
    assert (spearman["name"], spearman["n"]) == ("spearman", pairs) and abs(spearman["difference"]) < 1
    assert found["reference"]["spearman"] == spearman["reference"]
    few = evaluated(reference, reference, EvalOptions(data=str(tmp_path / "d.npz"), samples=4), SILENT).to_json()
    assert few["samples"] == 4 and few["tasks"][0]["scores"][0]["n"] == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pairs": [[0, 3]]}, "no scores"),
        ({"pairs": [[0, 20]], "scores": [1]}, "0..20 of 20"),
        ({"pairs": [0, 1], "scores": [1]}, "P, 2"),
    ],
)
def test_unusable_pairs_are_an_error(tmp_path: Path, reference: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((20, graphs.DIM), np.float32), **arrays)
    with pytest.raises(DataError, match=message):
        evaluated(reference, reference, EvalOptions(data=str(tmp_path / "d.npz")), SILENT)


def test_a_metric_of_the_user_and_a_chosen_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = graphs.float_model(tmp_path / "float.onnx", more=("hidden",))
    file = tmp_path / "mine.py"
    file.write_text("def size(outputs, labels):\n    return {n: abs(a).sum(1) for n, a in outputs.items()}\n", encoding="utf-8")
    np.savez(tmp_path / "d.npz", x=np.ones((20, graphs.DIM), np.float32), labels=np.zeros(20, np.int64))
    words = ["eval", str(reference), str(reference), "--data", str(tmp_path / "d.npz"), "--on", "hidden", "--metric"]
    assert main([*words, f"{file}:size", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [t["title"] for t in found["tasks"]] == ["classification by output 'hidden'", f"metric {file}:size"]
    assert [s["name"] for s in found["tasks"][1]["scores"]] == ["logits", "hidden"] and found["tasks"][1]["scores"][0]["low"] == 0
    assert main([*words, f"{file}:size", "--task", "none"]) == 0
    assert "hidden" in capsys.readouterr().out
    assert main([*words, str(file)]) == 2 and "FILE.py:FUNCTION" in capsys.readouterr().err
    assert main([*words, f"{file}:other"]) == 3 and "no function 'other'" in capsys.readouterr().err


def test_labels_that_fit_nothing_are_a_note(tmp_path: Path, reference: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((20, graphs.DIM), np.float32), labels=np.zeros((20, 3)))
    found = evaluated(reference, reference, EvalOptions(data=str(tmp_path / "d.npz")), SILENT)
    assert any("fit no output" in note for note in found.notes)


def test_a_metric_is_no_option_of_a_file_beside_the_model() -> None:
    assert next(o for o in options_of(EvalOptions) if o.name == "metric").written.once


def test_labels_outside_the_classes_are_an_error(tmp_path: Path, reference: Path) -> None:
    data = graphs.dataset(tmp_path / "d.npz", reference, labels=np.full(20, graphs.CLASSES))
    with pytest.raises(DataError, match="5 classes"):
        evaluate(reference, reference, data)


def test_half_precision_interfaces(tmp_path: Path, reference: Path) -> None:
    half = graphs.half_model(tmp_path / "half.onnx")
    result = evaluate(reference, half, graphs.dataset(tmp_path / "d.npz", reference)).to_json()
    assert 40 < result["sqnr_db"] < 100


def test_a_fixed_batch_that_the_data_does_not_fill(tmp_path: Path, reference: Path) -> None:
    fixed = graphs.float_model(tmp_path / "fixed.onnx", batch=8)
    data = graphs.dataset(tmp_path / "d.npz", reference, 20)
    result = evaluate(reference, fixed, data, per_layer=True).to_json()
    assert result["samples"] == 20 and result["sqnr_db"] > 100
    assert result["per_layer"][0]["sqnr_db"] > 100


def test_all_outputs_are_listed(tmp_path: Path) -> None:
    reference = graphs.float_model(tmp_path / "float.onnx", more=("hidden",))
    result = evaluate(reference, reference, graphs.dataset(tmp_path / "d.npz", reference)).to_json()
    same = {"sqnr_db": metrics.MAX_SQNR_DB, "equal": None, "note": "", "parts": ()}
    assert result["outputs"] == [{"name": "logits", **same}, {"name": "hidden", **same}]


def test_the_worst_output_counts(tmp_path: Path) -> None:
    reference = graphs.float_model(tmp_path / "float.onnx", more=("normed",))
    scaled = graphs.weights() | {
        "gamma": np.float32(1.1) * graphs.weights()["gamma"],
        "w2": graphs.weights()["w2"] / np.float32(1.1),
    }
    candidate = graphs.save(tmp_path / "scaled.onnx", graphs.body(), scaled, more=("normed",))
    result = evaluate(reference, candidate, graphs.dataset(tmp_path / "d.npz", reference)).to_json()
    assert [o["name"] for o in result["outputs"]] == ["normed", "logits"], "logits hardly move, and are the first output"
    assert result["sqnr_db"] == result["outputs"][0]["sqnr_db"] < result["outputs"][1]["sqnr_db"]
    assert result["relative_error"] > 0.05 and result["agreement"] is not None


def test_different_outputs_are_an_error(tmp_path: Path, reference: Path) -> None:
    two = graphs.float_model(tmp_path / "two.onnx", more=("hidden",))
    with pytest.raises(ModelError, match="outputs"):
        evaluate(reference, two, graphs.dataset(tmp_path / "d.npz", reference))


def test_nan_in_the_candidate_is_an_error(tmp_path: Path, reference: Path) -> None:
    w = graphs.weights()
    w["w2"][0, 0] = np.nan
    broken = graphs.save(tmp_path / "nan.onnx", graphs.body(), w)
    with pytest.raises(ModelError, match="candidate holds NaN"):
        evaluate(reference, broken, graphs.dataset(tmp_path / "d.npz", reference))


@pytest.mark.parametrize(("tensor", "hurt"), [("hidden", "fc2"), ("normed", "fc1")])
def test_per_layer_finds_where_the_error_enters(tmp_path: Path, reference: Path, tensor: str, hurt: str) -> None:
    candidate = graphs.coarse_model(tmp_path / "coarse.onnx", tensor, 1.0)
    rows = evaluate(reference, candidate, graphs.dataset(tmp_path / "d.npz", reference), per_layer=True).to_json()["per_layer"]
    assert [r["sqnr_db"] for r in rows] == sorted(r["sqnr_db"] for r in rows)
    assert {r["node"] for r in rows} == {"norm", "fc1", "act", "fc2"}
    row = next(r for r in rows if r["node"] == hurt)
    assert row["input_sqnr_db"] > 100 and row["sqnr_db"] < 30 and not row["rescaled"]
    json.dumps(rows, allow_nan=False)


def test_per_layer_leaves_out_a_name_that_means_another_quantity(tmp_path: Path) -> None:
    """A bias that moved behind its product: the product's output keeps its name and loses the bias."""
    held = {"w1": np.ones((graphs.DIM, graphs.CLASSES), np.float32), "c": np.full(graphs.CLASSES, 50, np.float32)}
    node = onnx.helper.make_node
    act = node("Relu", ["s"], ["logits"], name="act")
    before = [node("Gemm", ["x", "w1", "c"], ["h"], name="fc"), node("Identity", ["h"], ["s"], name="same"), act]
    after = [node("MatMul", ["x", "w1"], ["h"], name="fc"), node("Add", ["h", "c"], ["s"], name="bias"), act]
    paths = [graphs.save(tmp_path / f"{i}.onnx", nodes, held) for i, nodes in enumerate((before, after))]
    rows = evaluate(*paths, graphs.dataset(tmp_path / "d.npz", paths[0]), per_layer=True).to_json()["per_layer"]
    assert [r["node"] for r in rows] == ["act"]


def test_per_layer_undoes_folded_scales(tmp_path: Path, reference: Path) -> None:
    folded = graphs.folded_model(tmp_path / "folded.onnx")
    rows = evaluate(reference, folded, graphs.dataset(tmp_path / "d.npz", reference), per_layer=True).to_json()["per_layer"]
    assert {r["node"] for r in rows if r["rescaled"]} == {"norm"}
    assert min(r["sqnr_db"] for r in rows) > 80
