"""What is written is tried in its target's own setting before it takes its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import qcompile
from qcompile.backend import openvino, parser
from qcompile.calib.data import load_data
from qcompile.errors import BackendError, BuildError, GateError
from qcompile.ir import model as model_module
from qcompile.ir.model import Model
from qcompile.quant.spec import Scheme
from qcompile.report import Comparison
from qcompile.target.catalog import TARGETS
from qcompile.target.target import Target
from qcompile.target.trial import Trial
from qcompile.verbs.compile.trial import FileTrial
from qcompile.verbs.evaluate.outputs import evaluate
from tests.ir import tiny

MODELS = Path(__file__).parents[2] / "models"
QUICK: dict[str, Any] = {"samples": 16, "threads": 1}


@dataclass(frozen=True)
class _Refuses(Target):
    """Finds fault with every file."""

    def lowering(self, scheme: Scheme) -> tuple[str, ...]:
        return ()

    def tries(self, trial: Trial) -> None:
        assert isinstance(trial, FileTrial) and trial.file.exists() and trial.file.name != "q.onnx"
        raise GateError("no good; choose another")


def foreign(path: Path, known: bool = True) -> Path:
    """Relu, or an operator that nobody knows."""
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4]) for n in "xy"]
    node = helper.make_node("Relu", ["x"], ["y"]) if known else helper.make_node("Odd", ["x"], ["y"], domain="acme")
    imports = [helper.make_opsetid("", 19), helper.make_opsetid("acme", 1)]
    onnx.save(helper.make_model(helper.make_graph([node], "g", value[:1], value[1:]), opset_imports=imports, ir_version=9), path)
    return path


def trial(source: Path, written: Path, target: str = "ort") -> FileTrial:
    made = FileTrial(TARGETS[target], Model.load(source), [{"x": np.ones((1, 4), np.float32)}], 1)
    made.take(written, None)
    return made


def test_a_file_that_fails_leaves_nothing(tmp_path: Path) -> None:
    name = TARGETS.add(_Refuses("refuses_files", "for a test", ("w8a8",)))
    (tmp_path / "q.onnx").write_bytes(b"older")
    options: dict[str, Any] = {"passes": "canonicalize", "exact": True, "output": tmp_path / "q.onnx", **QUICK}
    try:
        with pytest.raises(GateError, match="no good"):
            qcompile.compile(MODELS / "digits_cnn.onnx", target=name, **options)
        assert [p.name for p in tmp_path.iterdir()] == ["q.onnx"]
        assert (tmp_path / "q.onnx").read_bytes() == b"older"
    finally:
        TARGETS._found.pop(name)  # pyright: ignore[reportPrivateUsage]


def test_data_beside_a_model_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "EXTERNAL_BYTES", 0)
    model = Model.from_proto(tiny.linear())

    def refuse(file: Path) -> None:
        Model.load(file)
        raise GateError("no good; choose another")

    with pytest.raises(GateError):
        model.save(tmp_path / "q.onnx", refuse)
    assert not list(tmp_path.iterdir())
    model.save(tmp_path / "q.onnx", lambda file: None)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".data", ".onnx"]
    with pytest.raises(GateError):
        model.save(tmp_path / "q.onnx", refuse)
    Model.load(tmp_path / "q.onnx")  # the older file keeps its data


def test_the_figure_is_that_of_the_file_as_it_runs(tmp_path: Path) -> None:
    source, written = MODELS / "digits_cnn.onnx", tmp_path / "q.onnx"
    result = qcompile.compile(source, target="ort", output=written, **QUICK)
    data = load_data(str(MODELS / "digits_cnn.calib.npz"), Model.load(source).inputs(), None, 16)
    seen = evaluate(source, written, data, threads=1)
    assert result.measured is not None and result.sqnr_db is not None and result.compared is not None
    assert result.sqnr_db == pytest.approx(seen.sqnr_db, abs=2)  # other samples
    exact = result.compared.sqnr_db or 0
    said = [n for n in result.notes if "exact arithmetic" in n]
    assert bool(said) == (exact > result.sqnr_db + 1), "a gap is said, with its cause"
    assert not said or "x64quantprecision" in said[0]


def test_a_default_session_that_fails_is_an_error_where_the_float_model_runs(tmp_path: Path) -> None:
    good, bad = foreign(tmp_path / "a.onnx"), foreign(tmp_path / "b.onnx", known=False)
    with pytest.raises(GateError, match=r"default ONNX Runtime session does not run.*Odd.*--keep-float"):
        trial(good, bad).runs()
    both = trial(bad, bad)
    both.runs()
    assert len(both.warnings) == 1 and "the float one neither" in both.warnings[0]


@pytest.mark.parametrize("feeds", [[], [{"x": np.ones((1, 4), np.float32)}]])
def test_many_nodes_are_opened_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, feeds: list[Any]) -> None:
    good, bad = foreign(tmp_path / "a.onnx"), foreign(tmp_path / "b.onnx", known=False)
    monkeypatch.setattr("qcompile.execute.compare.BLOCK_NODES", 0)
    monkeypatch.setattr("qcompile.verbs.compile.trial.open_model", None)
    made = trial(good, good)
    made.feeds = feeds
    made.loads()
    made.take(bad, None)
    with pytest.raises(GateError, match=r"does not run the model that was made.*Odd"):
        made.loads()


def test_rules_stop_what_the_float_model_does_not_break(tmp_path: Path) -> None:
    good, bad = foreign(tmp_path / "a.onnx"), foreign(tmp_path / "b.onnx", known=False)
    with pytest.raises(GateError, match="QC-TRT-015"):
        trial(good, bad, "trt").keeps_rules()
    both = trial(bad, bad, "trt")
    both.keeps_rules()
    assert "the float model has it, too" in both.warnings[0]


@pytest.mark.skipif(not parser.can_parse("rtx"), reason="tensorrt_rtx is not installed")
def test_the_parser_reads_it(tmp_path: Path) -> None:
    good, bad = foreign(tmp_path / "a.onnx"), foreign(tmp_path / "b.onnx", known=False)
    trial(good, good, "rtx").parses()
    with pytest.raises(BuildError, match=r"refuses the model.*Odd"):
        trial(good, bad, "rtx").parses()
    both = trial(bad, bad, "rtx")
    both.parses()
    assert "no engine can be built" in both.warnings[0]


@pytest.mark.skipif(not openvino.is_installed(), reason="openvino is not installed")
def test_the_plugin_runs_it(tmp_path: Path) -> None:
    x = np.linspace(-1, 1, 4, dtype=np.float32)[None]
    assert np.array_equal(openvino.answers(foreign(tmp_path / "a.onnx"), [{"x": x}])[0][0], np.maximum(x, 0))
    with pytest.raises(BackendError, match="OpenVINO"):
        openvino.answers(foreign(tmp_path / "b.onnx", known=False), [{"x": x}])


def test_integer_models_are_held_against_the_oracle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = MODELS / "digits_cnn.onnx"
    qcompile.compile(source, target="integer", output=tmp_path / "q.onnx", **QUICK)
    feeds = [{"input": np.load(MODELS / "digits_cnn.calib.npz")["input"][:2]}]
    made = FileTrial(TARGETS["integer"], Model.load(source), feeds, 1)
    made.take(tmp_path / "q.onnx", None)
    made.computes_exactly()
    monkeypatch.setattr("qcompile.verbs.compile.trial.decode", lambda graph, found: {"logits": np.zeros((2, 10))})
    with pytest.raises(GateError, match="integer arithmetic"):
        made.computes_exactly()


@pytest.mark.parametrize(("unsaturated", "says"), [(44.0, "kernels saturate"), (30.0, "fused kernels are less exact")])
def test_the_cause_is_saturation_where_most_of_the_error_goes_without_it(
    unsaturated: float, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantized source is compared with itself, so that exact arithmetic gives 200 dB and no kernel comes near."""
    made = FileTrial(TARGETS["ort"], Model.from_proto(tiny.linear()), [], 1, expected=Comparison(0.0, 200.0, 8))
    made.measured, made.file = Comparison(0.1, 29.0, 8), Path("q.onnx")
    monkeypatch.setattr(made, "_deployed", lambda *_: [])
    monkeypatch.setattr(made, "_compared", lambda _: Comparison(0.1, unsaturated, 8))
    made._explain()  # pyright: ignore[reportPrivateUsage]
    assert says in made.warnings[-1]
