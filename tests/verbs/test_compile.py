"""The whole way, through the Python API, on the shipped models."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qcompile
from qcompile.errors import DataError, GateError, ModelError, QcompileError, UsageError, VerifyError
from qcompile.execute.session import make_session
from qcompile.ir.model import Model
from qcompile.target.check import check
from qcompile.verbs.compile.job import prepare
from qcompile.verbs.compile.options import Options
from tests.ir import tiny

MODELS = Path(__file__).parents[2] / "models"
QUICK: dict[str, Any] = {"samples": 16, "threads": 1}


def compiled(path: Path, output: Path, **options: Any) -> qcompile.Result:
    return qcompile.compile(path, output=output, **{**QUICK, **options})


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("digits_cnn", "ort"),
        ("digits_cnn", "rtx"),
        ("vit_digits", "ort"),
        pytest.param("vit_digits", "rtx", marks=pytest.mark.slow),
    ],
)
def test_the_same_command_gives_the_same_bytes(tmp_path: Path, name: str, target: str) -> None:
    results = [compiled(MODELS / f"{name}.onnx", tmp_path / f"{i}.onnx", target=target) for i in range(2)]
    first, second = ((tmp_path / f"{i}.onnx").read_bytes() for i in range(2))
    assert first == second
    assert not [f for f in check(onnx.load_from_string(first), target) if f.severity == "error"]
    compared = results[0].compared
    assert (
        compared is not None
        and (compared.sqnr_db or 0) > 20
        and results[0].calibration == str(MODELS / f"{name}.calib.npz")
        and results[0].samples == 16
    )
    accuracy(tmp_path / "0.onnx", name, target)


def accuracy(path: Path, name: str, target: str) -> None:
    with np.load(MODELS / f"{name}.eval.npz") as data:
        x, labels = data["input"][:100], data["labels"][:100]
    session = make_session(path, qdq_fusion=target == "ort", threads=1)
    logits = np.asarray(session.run(None, {"input": x})[0])
    assert (logits.argmax(1) == labels).mean() >= 0.97


def test_the_output_says_how_it_was_made(tmp_path: Path) -> None:
    result = compiled(MODELS / "digits_cnn.onnx", tmp_path / "q.onnx", target="ort", passes="smooth")
    metadata = Model.load(tmp_path / "q.onnx").metadata
    assert metadata["qcompile.pipeline"] == result.pipeline and "smooth" in result.pipeline
    assert metadata["qcompile.target"] == "ort" and metadata["qcompile.scheme"] == "w8a8"
    assert metadata["qcompile.seed"] == "0"
    assert metadata["qcompile.source"] == Model.load(MODELS / "digits_cnn.onnx").digest()
    assert '"random": false' in metadata["qcompile.calibration"]


def test_a_pipeline_that_stopped_half_way_goes_on(tmp_path: Path) -> None:
    """Decisions travel in the file: annotate in one run, the rest in another."""
    whole = compiled(MODELS / "digits_cnn.onnx", tmp_path / "whole.onnx", target="ort", passes="")
    specs = whole.pipeline.split(",")
    at = next(i for i, s in enumerate(specs) if s.startswith("annotate")) + 1
    compiled(MODELS / "digits_cnn.onnx", tmp_path / "half.onnx", target="ort", passes=",".join(specs[:at]), exact=True)
    rest = compiled(
        tmp_path / "half.onnx", tmp_path / "rest.onnx", target="ort", passes="", calib=str(MODELS / "digits_cnn.calib.npz")
    )
    assert rest.pipeline == ",".join(specs[at:])
    assert Model.load(tmp_path / "rest.onnx").digest() == Model.load(tmp_path / "whole.onnx").digest()


def test_a_finished_integer_model_is_refused(tmp_path: Path) -> None:
    compiled(MODELS / "digits_cnn.onnx", tmp_path / "q.onnx", target="integer", passes="")
    with pytest.raises(ModelError, match="computes with integers alone, which cannot be read back; start from the float model"):
        compiled(tmp_path / "q.onnx", tmp_path / "again.onnx", target="integer", passes="", calib="random")


# reports and gates


def test_reports_are_json_even_where_nothing_was_lost(tmp_path: Path) -> None:
    written = {"report": tmp_path / "report.json", "remarks": tmp_path / "remarks.json"}
    compiled(MODELS / "digits_cnn.onnx", tmp_path / "q.onnx", target="ort", **written)
    assert '"schema_version"' in (tmp_path / "report.json").read_text() and "NaN" not in (tmp_path / "report.json").read_text()


def test_a_gate_that_does_not_hold_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"SQNR of output 'logits' is .* below --min-sqnr 150"):
        compiled(MODELS / "digits_cnn.onnx", tmp_path / "q.onnx", target="ort", min_sqnr=150.0)
    assert listing(tmp_path) == []


def test_strict_names_the_pass_that_matched_nothing(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"--strict: pass 'repq' changed nothing"):
        compiled(MODELS / "digits_cnn.onnx", tmp_path / "q.onnx", target="ort", passes="repq", strict=True)
    assert listing(tmp_path) == []


def test_keeping_everything_in_float_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing in the model can be quantized to w8a8 for ort"):
        compiled(MODELS / "digits_cnn.onnx", tmp_path / "q.onnx", target="ort", passes="", keep_float=("*",))
    assert listing(tmp_path) == []


SURGERY = """
import qcompile

@qcompile.surgery(kind="equivalent")
def liar(graph):
    for node in graph.nodes:
        if node.op == "Gemm":
            node.inputs[1].values = node.inputs[1].values * 2
"""


def test_a_failed_pass_leaves_its_reproducer(tmp_path: Path) -> None:
    script = tmp_path / "my_surgery.py"
    script.write_text(SURGERY)
    with pytest.raises(VerifyError, match=r"(?s)moved the outputs.*reproduce: qcompile ") as error:
        compiled(MODELS / "digits_cnn.onnx", tmp_path / "q.onnx", target="ort", passes=f"{script}:liar")
    (before,) = [p for p in tmp_path.iterdir() if p.name.startswith("q.before-") and p.suffix == ".onnx"]
    assert f"qcompile {before} --exact --passes {script}:liar --target ort" in str(error.value)
    with pytest.raises(VerifyError, match="moved the outputs"):
        compiled(
            before,
            tmp_path / "q.onnx",
            target="ort",
            passes=f"{script}:liar",
            exact=True,
            calib=str(MODELS / "digits_cnn.calib.npz"),
        )


# what cannot be used


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def fails(error: type[QcompileError], words: str, path: Path, folder: Path, **options: Any) -> None:
    before = listing(folder)
    with pytest.raises(error, match=words):
        compiled(path, folder / "out.onnx", target="ort", **options)
    assert listing(folder) == before, "nothing is left behind"


def test_a_truncated_model(tmp_path: Path) -> None:
    data = (MODELS / "digits_cnn.onnx").read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 1):
        fails(
            ModelError,
            "not a readable ONNX model|not an ONNX model",
            write(tmp_path / "m.onnx", data[:size]),
            tmp_path,
            calib="random",
        )


@pytest.mark.parametrize("data", [b"PK\x03\x04 a zip", b"hello world", bytes(range(256))], ids=["zip", "text", "bytes"])
def test_something_else_than_a_model(tmp_path: Path, data: bytes) -> None:
    fails(ModelError, "ONNX model", write(tmp_path / "m.onnx", data), tmp_path, calib="random")


def test_no_model(tmp_path: Path) -> None:
    fails(ModelError, "no model at .*: check the path", tmp_path / "none.onnx", tmp_path)


def external(folder: Path) -> Path:
    path = folder / "big.onnx"
    onnx.save(tiny.linear(64), path, save_as_external_data=True, location="big.data", size_threshold=0)
    return path


def test_external_weights(tmp_path: Path) -> None:
    path = external(tmp_path)
    stored = (tmp_path / "big.data").read_bytes()
    result = compiled(path, tmp_path / "q.onnx", target="ort", calib="random")
    assert (result.sqnr_db or 0) > 20 and (tmp_path / "big.data").read_bytes() == stored
    shutil.move(tmp_path / "q.onnx", tmp_path / "moved.onnx")
    (tmp_path / "big.data").unlink()
    make_session(tmp_path / "moved.onnx")


def test_missing_and_truncated_external_weights(tmp_path: Path) -> None:
    path = external(tmp_path)
    data = (tmp_path / "big.data").read_bytes()
    (tmp_path / "big.data").write_bytes(data[:-1])
    fails(ModelError, "weights file big.data is truncated; copy it again", path, tmp_path, calib="random")
    (tmp_path / "big.data").unlink()
    fails(ModelError, "weights file big.data is missing; put it beside the model", path, tmp_path, calib="random")


def archive(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "d.npz", **arrays)
    return str(folder / "d.npz")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"image": np.zeros((20, 1, 32, 32), np.float32)}, "input"),
        ({"input": np.zeros((20, 3, 32, 32), np.float32)}, "3"),
        ({"input": np.full((20, 1, 32, 32), np.nan, np.float32)}, "NaN"),
        ({"input": np.zeros((4, 1, 32, 32), np.float32)}, "holds 4 samples, 16 are wanted"),
    ],
    ids=["names", "shape", "nan", "few"],
)
def test_wrong_data(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    fails(DataError, words, MODELS / "digits_cnn.onnx", tmp_path, calib=archive(tmp_path, **arrays))


def test_no_data(tmp_path: Path) -> None:
    shutil.copy(MODELS / "digits_cnn.onnx", tmp_path / "m.onnx")
    fails(
        DataError,
        "no calibration data: give some with --calib, or put m.calib.npz beside the model",
        tmp_path / "m.onnx",
        tmp_path,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "tensorrt"}, "unknown target 'tensorrt'"),
        ({"scheme": "w8a9"}, "unknown scheme 'w8a9', did you mean 'w8a8'"),
        ({"target": "ort", "scheme": "fp8"}, "target 'ort' has no scheme 'fp8'"),
        ({"passes": "smoth"}, "unknown pass 'smoth', did you mean 'smooth'"),
    ],
)
def test_usage(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        prepare(MODELS / "digits_cnn.onnx", Options(output=tmp_path / "q.onnx", **options))


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    shutil.copy(MODELS / "digits_cnn.onnx", path)
    (tmp_path / "link.onnx").symlink_to(path)
    for output in (path, tmp_path / "link.onnx", tmp_path / "." / "m.onnx"):
        with pytest.raises(UsageError, match="is the input; choose another name with -o"):
            compiled(path, output, target="ort", calib="random")
    for output, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "q.onnx", "does not exist")):
        with pytest.raises(UsageError, match=words):
            compiled(path, output, target="ort", calib="random")


# beside the model


def test_conventions_beside_the_model(tmp_path: Path) -> None:
    shutil.copy(MODELS / "digits_cnn.onnx", tmp_path / "m.onnx")
    shutil.copy(MODELS / "digits_cnn.calib.npz", tmp_path / "m.calib.npz")
    (tmp_path / "m.qcompile.toml").write_text('target = "ort"\npasses = "fold-bn"\nsamples = 8\n')
    result = qcompile.compile(tmp_path / "m.onnx", output=tmp_path / "q.onnx", threads=1)
    assert (result.target, result.samples, result.calibration) == ("ort", 8, str(tmp_path / "m.calib.npz"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("target =", "not valid TOML"),
        ('targt = "ort"', "unknown key 'targt', did you mean 'target'"),
        ('samples = "8"', "samples cannot be '8'"),
    ],
)
def test_a_wrong_sidecar(tmp_path: Path, text: str, words: str) -> None:
    shutil.copy(MODELS / "digits_cnn.onnx", tmp_path / "m.onnx")
    (tmp_path / "m.qcompile.toml").write_text(text)
    with pytest.raises(UsageError, match=words):
        qcompile.compile(tmp_path / "m.onnx", output=tmp_path / "q.onnx")


# killed


def child(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_a_killed_process_leaves_no_part_of_an_output(tmp_path: Path) -> None:
    """Once in the middle of writing (before the rename), with an older output in place, and at random moments."""
    output = write(tmp_path / "q.onnx", b"an older output")
    arguments = f"{str(MODELS / 'digits_cnn.onnx')!r}, output={str(output)!r}, target='ort', samples=4, threads=1, verify='off'"
    compile_it = f"import os, time, qcompile; {{}}; qcompile.compile({arguments})"
    writing = child(compile_it.format("os.fsync = lambda f: (print('now', flush=True), time.sleep(600))"))
    assert writing.stdout is not None and writing.stdout.readline() == "now\n"
    kill(writing)
    assert output.read_bytes() == b"an older output"
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", compile_it.format("pass")], check=True, capture_output=True)
    whole, good = time.monotonic() - start, output.read_bytes()
    rng = random.Random(0)
    for _ in range(2):
        output.unlink(missing_ok=True)
        process = child(compile_it.format("pass"))
        time.sleep(whole * rng.uniform(0.5, 1.0))
        kill(process)
        assert not output.exists() or output.read_bytes() == good
        assert all(name.startswith(".") for name in set(listing(tmp_path)) - {output.name})


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_full_disk_or_read_only_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelError, match=r"cannot write .*No space left on device; free some space"):
        compiled(MODELS / "digits_cnn.onnx", tmp_path / "q.onnx", target="ort")
    assert listing(tmp_path) == []


NOISY = """<ir_version: 9, opset_import: ["" : 17]> noisy (float[N,32] x) => (float[N,32] y, float[N,32] z)
{ h = MatMul(x, w) r = RandomNormalLike(h) s = Add(h, r) z = MatMul(h, v) y = MatMul(s, v) }"""


def noisy(folder: Path) -> Path:
    """A model with a random output and one that is not; its data lies beside it."""
    rng, proto = np.random.default_rng(0), onnx.parser.parse_model(NOISY)
    made = {n: rng.normal(0, 32**-0.5, (32, 32)).astype(np.float32) for n in ("w", "v")}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in made.items())
    onnx.save(proto, folder / "noisy.onnx")
    np.savez(folder / "noisy.calib.npz", x=rng.normal(size=(16, 32)).astype(np.float32))
    return folder / "noisy.onnx"


def test_a_model_that_differs_from_itself_is_said_to(tmp_path: Path) -> None:
    first, second = (compiled(noisy(tmp_path), tmp_path / f"{i}.onnx", target="ort", passes="") for i in range(2))
    assert [n for n in first.notes if "RandomNormalLike" in n and "two runs of the float model differ in y" in n]
    assert [(o.name, o.sqnr_db is None) for o in first.outputs] == [("z", False), ("y", True)]
    assert first.sqnr_db == first.outputs[0].sqnr_db and (first.sqnr_db or 0) > 20
    assert first.output.read_bytes() == second.output.read_bytes(), "random operators draw from --seed"


def test_no_figure_is_no_gate(tmp_path: Path) -> None:
    path = noisy(tmp_path)
    proto = onnx.load(path)
    del proto.graph.output[1]
    onnx.save(proto, path)
    with pytest.raises(GateError, match=r"no output can be measured in dB \(y: differs from run to run"):
        compiled(path, tmp_path / "q.onnx", target="ort", passes="", min_sqnr=20.0)
