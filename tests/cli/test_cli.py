"""The command line from outside: documents, exit codes, and where output goes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qcompile.cli import app, main
from qcompile.report import json_text

ROOT = Path(__file__).parents[2]
VIT, CNN = ROOT / "models" / "vit_digits.onnx", ROOT / "models" / "digits_cnn.onnx"
EVAL = ROOT / "models" / "digits_cnn.eval.npz"
Capture = pytest.CaptureFixture[str]


def call(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of one command."""
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def document(capsys: Capture, *arguments: object) -> dict[str, Any]:
    """The JSON document of a command that ends well; standard output must hold nothing else."""
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    made = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert made["schema_version"] == 1
    return made


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits CNN compiled for ONNX Runtime with default flags."""
    out = tmp_path_factory.mktemp("cli") / "cnn.ort.onnx"
    assert main([str(CNN), "--target", "ort", "--samples", "32", "-o", str(out)]) == 0
    return out


# ---- compile ------------------------------------------------------------------------------------------------------


def test_what_was_not_compared_has_no_figure(tmp_path: Path, capsys: Capture) -> None:
    words = ("--target", "trt", "--samples", 16, "--verify", "off", "-o", tmp_path / "out.onnx")
    code, text, err = call(capsys, CNN, *words)
    assert code == 0, err
    assert "SQNR         not measured (--verify off)\n" in text


@pytest.mark.parametrize("words", [(), ("compile",)], ids=["default command", "named"])
def test_a_model_is_compiled_with_the_data_beside_it(words: tuple[str, ...], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out.onnx"
    code, text, err = call(capsys, *words, VIT, "--passes", "repq,smooth", "--target", "ort", "--samples", 64, "-o", out)
    assert code == 0, err
    assert out.is_file()
    assert "repq" in text and "claimed by repq" in text and f"output       {out}" in text
    assert "64 samples of" in text and "found beside the model" in text
    assert "[1/" in err, "progress goes to standard error"


def test_the_output_is_named_after_model_target_and_scheme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(capsys, CNN, "--target", "ort", "--samples", 8, "--passes", "")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["digits_cnn.ort-w8a8.onnx"]


def test_json_is_the_only_thing_on_standard_output(tmp_path: Path, capsys: Capture) -> None:
    report, remarks = tmp_path / "report.json", tmp_path / "remarks.json"
    made = document(
        capsys, CNN, "--target", "ort", "--samples", 8, "-o", tmp_path / "o.onnx", "--report", report, "--remarks", remarks
    )
    assert made["target"] == "ort" and made["samples"] == 8 and made["sweeps"] >= 1 and made["sqnr_db"] > 10
    assert json.loads(report.read_text())["pipeline"] == made["pipeline"]
    listed = json.loads(remarks.read_text())["remarks"]
    assert listed and set(listed[0]) == {"kind", "pass", "node", "reason", "numbers"}


def test_the_same_command_gives_the_same_bytes(int8: Path, tmp_path: Path, capsys: Capture) -> None:
    again = tmp_path / "again.onnx"
    assert call(capsys, CNN, "--target", "ort", "--samples", 32, "-o", again)[0] == 0
    assert again.read_bytes() == int8.read_bytes()


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    code, text, _ = call(capsys, VIT, "--passes", "repq,smooth", "--dry-run")
    assert code == 0 and not list(tmp_path.iterdir())
    assert text.splitlines()[0].startswith("canonicalize,") and "repq,smooth" in text.splitlines()[0]
    assert "inserted" in text and "sweeps" in text
    plan = document(capsys, VIT, "--passes", "repq,smooth", "--dry-run")
    assert [p["pass"] for p in plan["passes"] if not p["inserted"]] == ["repq", "smooth"]


def test_keep_float_patterns_reach_the_passes(int8: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "half.onnx"
    patterns = ("--keep-float", "/stages/stages.2*", "--keep-float", "/stages/stages.3*")
    code, _, err = call(capsys, CNN, "--target", "ort", "--samples", 8, "-o", out, *patterns)
    assert code == 0, err
    fewer, all_of_them = (sum(n.op_type == "QuantizeLinear" for n in onnx.load(p).graph.node) for p in (out, int8))
    assert 0 < fewer < all_of_them


def test_selectors_reach_the_passes_and_the_report(tmp_path: Path, capsys: Capture) -> None:
    out, report = tmp_path / "q.onnx", tmp_path / "report.json"
    chosen = ("--keep-float", "region:../stages/stages.0/Relu", "--quantize", "op:Gemm", "--quantize", "op:LSTM")
    code, _, err = call(capsys, CNN, "--target", "trt", "--samples", 8, "-o", out, "--report", report, *chosen)
    assert code == 0 and "--quantize op:LSTM selects no node" in err, err
    assert json.loads(report.read_text())["selectors"] == {
        "keep_float": ["region:../stages/stages.0/Relu"], "only": [], "quantize": ["op:Gemm", "op:LSTM"], "bits": [],
    }  # fmt: skip
    graph = onnx.load(out).graph
    quantized = {name for n in graph.node if n.op_type == "DequantizeLinear" for name in n.output}
    assert all(n.input[1] in quantized for n in graph.node if n.op_type == "Gemm")


def test_widths_by_layer_show_in_every_report(tmp_path: Path, capsys: Capture) -> None:
    out, widths = (
        tmp_path / "mixed.onnx",
        ("--bits", "region:/stages/stages.1/Relu_1..=w4a4", "--bits", "op:Gemm=w8a8", "--bits", "nil=w4a4"),
    )
    code, said, err = call(capsys, CNN, "--target", "integer", "--samples", 8, "-o", out, *widths)
    assert code == 0 and "--bits nil=w4a4 selects no node" in err and "GBOPs a sample" in said, err
    _, text, _ = call(capsys, "check", out, "--target", "integer", "--json")
    checked = json.loads(text)
    _, text, _ = call(capsys, "inspect", out, "--json")
    assert checked["cost"] == json.loads(text)["integer"] and not checked["errors"]
    found = [(x["weight_bits"], x["activation_bits"]) for x in checked["cost"]["layers"]]
    assert found == [(8, 8)] * 6 + [(4, 4)] * 4 + [(8, 8)]
    assert checked["cost"]["bops"] == sum(x["macs"] * w * a for x, (w, a) in zip(checked["cost"]["layers"], found, strict=True))
    assert call(capsys, "check", out, "--target", "integer", "--proof")[0] == 0
    code, said, _ = call(capsys, "inspect", out)
    assert code == 0 and "GBOPs a sample" in said and "activation bits" in said


# ---- what fails, and how ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((VIT, "--passes", "repq,smoth"), 2, "did you mean 'smooth'"),
        ((VIT, "--passes", "smooth{alpha=3}"), 2, "outside"),
        ((VIT, "--nonsense"), 2, "No such option"),
        ((VIT, "--target", "gpu"), 2, "is not one of"),
        ((VIT, "--target", "ort", "--scheme", "fp8"), 2, "has no scheme"),
        ((VIT, "--target", "ort", "--bits", "fc*=w4a4"), 2, "widths of integer-only models; use --target integer"),
        ((VIT, "--target", "integer", "--bits", "fc*=w9a4"), 2, "'w9a4' is no width"),
        ((VIT, "--target", "ort", "--engine", "x.engine"), 2, "builds no engine"),
        ((VIT, "--target", "rtx", "--scheme", "w4a4", "--engine", "x.engine"), 2, "only simulated"),
        ((VIT, "--target", "rtx", "--engine", "no/such/folder/x.engine"), 2, "does not exist"),
        ((VIT, "--gpu", "ada"), 2, "sm89"),
        (("evall", "a.onnx"), 2, "did you mean 'eval'"),
        (("eval", "a.onnx", "b.onnx"), 2, "--data"),
        (("passes", "smoth"), 2, "did you mean 'smooth'"),
        (("no-such.onnx",), 3, "no model at"),
        (("inspect", "no-such.onnx"), 3, "no model at"),
        (("check", "no-such.onnx"), 3, "no model at"),
        ((VIT, "--calib", "no-such.npz"), 3, "no data at"),
        ((VIT, "--samples", "100000"), 3, "samples"),
    ],
    ids=str,
)
def test_one_message_and_the_right_exit_code(arguments: tuple[object, ...], code: int, says: str, capsys: Capture) -> None:
    got, out, err = call(capsys, *arguments)
    assert got == code, err
    assert says in err and err.startswith("error: ")
    assert not out and "Traceback" not in err


def test_a_truncated_model_is_refused(tmp_path: Path, capsys: Capture) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(CNN.read_bytes()[:5000])
    code, _, err = call(capsys, broken, "--calib", "random")
    assert code == 3 and "not a readable ONNX model" in err


def test_an_engine_of_a_missing_backend_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from qcompile.backend import tensorrt

    monkeypatch.setitem(tensorrt.MODULES, "trt", "no_such_tensorrt")
    out = tmp_path / "o.onnx"
    code, _, err = call(capsys, VIT, "--target", "trt", "--engine", tmp_path / "e.engine", "-o", out)
    assert code == 4 and "--target rtx" in err and not out.exists()


def test_a_gate_that_does_not_hold(tmp_path: Path, capsys: Capture) -> None:
    args = ("--target", "ort", "--samples", 8, "-o", tmp_path / "o.onnx")
    code, _, err = call(capsys, CNN, *args, "--min-sqnr", 200)
    assert code == 1 and "--min-sqnr" in err


def test_interruption_and_bugs(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def raising(error: BaseException) -> Any:
        def run(*_: object, **__: object) -> None:
            raise error

        return run

    monkeypatch.setattr(app.cli, "main", raising(KeyboardInterrupt()))
    assert main([]) == 130
    monkeypatch.setattr(app.cli, "main", raising(ZeroDivisionError("two\nlines")))
    assert main([]) == 1
    err = capsys.readouterr().err
    assert "internal error: ZeroDivisionError: two lines" in err and "Traceback" not in err
    monkeypatch.setenv(app.DEBUG, "1")
    assert main([]) == 1 and "Traceback" in capsys.readouterr().err


def test_no_arguments_show_the_help(capsys: Capture) -> None:
    code, _, err = call(capsys)
    assert code == 2 and "Commands:" in err
    code, out, _ = call(capsys, "--help")
    assert code == 0 and "qcompile MODEL [OPTIONS]" in out


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "qcompile", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("qcompile ")


# ---- the other commands -------------------------------------------------------------------------------------------


def test_eval(int8: Path, capsys: Capture) -> None:
    made = document(capsys, "eval", CNN, int8, "--data", EVAL, "--samples", 64, "--per-layer")
    keys = {"reference", "candidate", "agreement", "kl", "cosine", "sqnr_db", "samples", "per_layer"}
    assert keys <= set(made) and made["samples"] == 64 and made["candidate"]["top1"] > 0.9
    code, out, _ = call(capsys, "eval", CNN, int8, "--data", EVAL, "--samples", 64, "--per-layer")
    assert code == 0 and "top-1" in out and "worst layers" in out


def test_bench(int8: Path, capsys: Capture) -> None:
    made = document(capsys, "bench", CNN, int8, "--runs", 2, "--threads", 1)
    assert [set(m) for m in made["models"]] == [{"path", "median_ms", "min_ms"}] * 2
    assert made["ratios"][0]["median"] == 1
    assert call(capsys, "bench", CNN, "--runs", 1, "--threads", 1)[0] == 0


def test_check(int8: Path, capsys: Capture) -> None:
    made = document(capsys, "check", int8)
    assert made["target"] == "ort" and not made["errors"], "the target is taken from the model"
    assert made["quantized"] and not document(capsys, "check", CNN)["quantized"]
    assert "nothing in this model is quantized; to do it, type: qcompile MODEL --target trt" in call(capsys, "check", CNN)[1]
    code, out, _ = call(capsys, "check", int8, "--target", "trt", "--json")
    errors = json.loads(out)["errors"]
    assert code == 1 and set(errors[0]) == {"rule", "node", "message", "fix", "fixable"}
    code, out, _ = call(capsys, "check", int8, "--target", "trt")
    assert code == 1 and "error QC-TRT-001 zero point" in out and "what to do:" in out


def test_inspect(int8: Path, capsys: Capture) -> None:
    made = document(capsys, "inspect", int8)
    assert made["metadata"]["target"] == "ort" and made["structures"] is None
    assert made["weights"]["share"] > 0.9
    weight = next(t for t in made["quantized"] if t["role"] == "weight" and t["dtype"] == "int8")
    assert weight["granularity"] == "per-axis 0" and 0 < weight["scale_min"] <= weight["scale_max"]
    float_model = document(capsys, "inspect", VIT)
    assert float_model["quantized"] == [] and float_model["structures"]["attentions"]["found"] == 6
    assert {v["name"] for v in float_model["inputs"]} == {"input"}
    assert "attentions" in call(capsys, "inspect", VIT)[1] and "per-tensor" in call(capsys, "inspect", int8)[1]


def test_passes(capsys: Capture) -> None:
    listed = document(capsys, "passes")["passes"]
    assert {"repq", "smooth", "annotate", "insert-qdq"} <= {p["name"] for p in listed}
    assert all(p["help"] and p["kind"] in ("equivalent", "annotate", "fit", "lower") for p in listed)
    assert all(o["help"] for p in listed for o in p["options"]), "every option has a help text"
    one = document(capsys, "passes", "smooth")
    alpha = next(o for o in one["options"] if o["name"] == "alpha")
    assert alpha == {"name": "alpha", "takes": "a number", "default": "0.5", "help": alpha["help"]} and "before:" in one["text"]
    assert "smooth" in call(capsys, "passes")[1] and "alpha" in call(capsys, "passes", "smooth")[1]


@pytest.mark.rtx
def test_compile_build_and_audit_with_rtx(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("tensorrt_rtx")
    model, engine = tmp_path / "m.onnx", tmp_path / "m.engine"
    made = document(capsys, CNN, "--target", "rtx", "--samples", 8, "-o", model, "--engine", engine, "--gpu", "sm89")
    figures = made["engine"]["audits"]["sm89"]
    manifest = json.loads((tmp_path / "m.engine.json").read_text())
    assert engine.stat().st_size == made["engine"]["size"] and manifest["audit"]["sm89"] == figures
    audited = document(capsys, "audit", model, "--gpu", "sm89", "--min-share", 0.5)
    keys = {"share", "coverage", "planned_flops", "low_precision_flops", "total_flops", "attention_fused", "kernels"}
    assert keys <= set(audited) and audited["share"] == figures["share"] > 0.9
    code, _, err = call(capsys, "audit", CNN, "--gpu", "sm89", "--min-share", 0.5)
    assert code == 1 and "share is None, below --min-share 0.5" in err
    built = document(capsys, "build", model, "-o", tmp_path / "again.engine", "--profile", "input:1x1x32x32,2x1x32x32,4x1x32x32")
    assert built["profiles"][0]["shapes"]["input"][2] == [4, 1, 32, 32]


def test_json_text_has_no_nan() -> None:
    text = json_text({"a": math.inf, "b": [np.float32("nan"), np.int64(3)], "c": (1.5, Path("x")), "d": {"e": -math.inf}})
    assert json.loads(text) == {"a": None, "b": [None, 3], "c": [1.5, "x"], "d": {"e": None}}
