"""`qcompile calibrate`, `merge` and `--stats`: the same bytes whatever happens on the way."""

from __future__ import annotations

import json
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

from qcompile.calib.store.store import load
from qcompile.cli import main
from qcompile.errors import UsageError
from qcompile.ir.model import Model
from qcompile.pipeline.base import Needs, Pass, PassContext, Rounds
from qcompile.report import Silent
from qcompile.verbs.calibrate.run import calibrate, until_last_reader
from qcompile.verbs.compile.job import prepare
from qcompile.verbs.compile.options import Options

ROOT = Path(__file__).parents[2]
CNN = ROOT / "models" / "digits_cnn.onnx"
DATA = ROOT / "models" / "digits_cnn.calib.npz"
COMMON = ["--target", "ort", "--calib", str(DATA), "--threads", "1"]
Capture = pytest.CaptureFixture[str]


def call(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of 128 samples, gathered undisturbed."""
    out = tmp_path_factory.mktemp("whole") / "s.qstats"
    assert call("calibrate", CNN, *COMMON, "-o", out) == 0
    return out


class Interrupted(Silent):
    """Presses Ctrl-C after so many batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_sweep(self, done: int, total: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def test_an_interrupted_calibration_loses_only_its_batch(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.qstats"
    job = prepare(CNN, Options(target="ort", calib=str(DATA), threads=1))
    rng, held = random.Random(0), 0
    for _ in range(4):
        batches = rng.randint(1, 4)
        with pytest.raises(KeyboardInterrupt):
            calibrate(job, out, Interrupted(batches))
        ((start, stop),) = load(out).sweeps[0].ranges
        assert (start, stop) == (0, held + 8 * batches)
        held = stop
    made = calibrate(job, out, Silent(), resume=True)
    assert made.resumed == held and not made.missing
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("extra", [[], ["--workers", "2"]], ids=["one process", "pool"])
def test_a_killed_calibration_goes_on(extra: list[str], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.qstats"
    words = [sys.executable, "-m", "qcompile", "calibrate", str(CNN), *COMMON, "-o", str(out), *extra]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not out.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    load(out)  # never half a file
    assert call(*words[3:]) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["s.qstats"]


def test_shards_merge_to_the_same_bytes(whole: Path, tmp_path: Path, capsys: Capture) -> None:
    parts = [tmp_path / f"{i}.qstats" for i in (1, 2)]
    for i, part in enumerate(parts, 1):
        assert call("calibrate", CNN, *COMMON, "--shard", f"{i}/2", "-o", part) == 0
    assert "missing      samples 0-63" in capsys.readouterr().out
    assert call(CNN, "--target", "ort", "--stats", parts[0], "-o", tmp_path / "q.onnx") == 3
    assert "lacks samples 64-127" in capsys.readouterr().err
    assert call("merge", *reversed(parts), "-o", tmp_path / "all.qstats", "--json") == 0
    assert json.loads(capsys.readouterr().out)["missing"] == []
    assert (tmp_path / "all.qstats").read_bytes() == whole.read_bytes()
    assert call("merge", parts[0], parts[0], "-o", tmp_path / "twice.qstats") == 3
    assert "both hold samples 0-63; leave one of them out" in capsys.readouterr().err


def test_statistics_stand_in_for_the_data(whole: Path, tmp_path: Path, capsys: Capture) -> None:
    alone = tmp_path / "m.onnx"
    shutil.copy(CNN, alone)
    assert call(alone, *COMMON, "-o", tmp_path / "data.onnx", "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert call(alone, "--target", "ort", "--threads", 1, "--stats", whole, "-o", tmp_path / "stats.onnx", "--json") == 0
    second = json.loads(capsys.readouterr().out)
    assert (tmp_path / "data.onnx").read_bytes() == (tmp_path / "stats.onnx").read_bytes()
    assert (first["sweeps"], second["sweeps"]) == (1, 0) and first["sqnr_db"] == second["sqnr_db"]
    assert str(whole) in second["calibration"] and second["samples"] == 128


def test_statistics_of_every_round_are_kept(tmp_path: Path, capsys: Capture) -> None:
    """Each level of a sequential correction is measured behind the corrected ones in front of it."""
    alone, stats = tmp_path / "m.onnx", tmp_path / "s.qstats"
    shutil.copy(CNN, alone)
    words = ["--target", "ort", "--threads", "1", "--passes", "bias-correct{mode=sequential}"]
    data = ["--calib", str(DATA), "--samples", "16"]
    assert call("calibrate", alone, *words, *data, "-o", stats) == 0
    capsys.readouterr()
    assert call(alone, *words, *data, "-o", tmp_path / "data.onnx", "--json") == 0
    assert json.loads(capsys.readouterr().out)["sweeps"] > 3
    assert call(alone, *words, "--stats", stats, "-o", tmp_path / "stats.onnx", "--json") == 0
    assert json.loads(capsys.readouterr().out)["sweeps"] == 0
    assert (tmp_path / "data.onnx").read_bytes() == (tmp_path / "stats.onnx").read_bytes()


def test_passes_run_up_to_the_last_that_asks_for_statistics() -> None:
    class Asks(Pass):
        def rounds(self, model: Model, ctx: PassContext) -> Rounds:
            yield Needs(model, (), "asks")
            return self.apply(model, ctx)

    silent, asks = Pass(), Asks()
    assert until_last_reader([silent, asks, silent]) == [silent, asks] and until_last_reader([silent]) == []


def test_what_the_file_does_not_hold_is_swept_or_refused(whole: Path, tmp_path: Path, capsys: Capture) -> None:
    other = ["--passes", "repq", "--target", "rtx", "--stats", whole, "-o", tmp_path / "q.onnx"]
    assert call(CNN, *other) == 3
    assert "statistics that the passes ask for" in capsys.readouterr().err
    assert call(CNN, *other, "--calib", DATA, "--json") == 0
    assert json.loads(capsys.readouterr().out)["sweeps"] >= 1


def test_observers_of_the_model_as_it_is(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "s.qstats"
    assert call("calibrate", CNN, *COMMON, "--observers", "minmax, histogram", "--samples", 16, "-o", out) == 0
    kinds = {type(p.observer).__name__ for p in load(out).sweeps[0].stats}
    assert {"MinMax", "Histogram"} <= kinds
    assert call("calibrate", CNN, *COMMON, "--observers", "minmx", "-o", tmp_path / "t.qstats") == 2
    assert "unknown observer 'minmx', did you mean 'minmax'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--samples", "64"], "data ("),
        (["--seed", "3"], "seed (0 against 3)"),
        (["--batch", "4"], "batch (8 against 4)"),
        (["--passes", "smooth"], "the passes ("),
        (["--keep-float", "*onv*"], "other probes than this command asks for"),
    ],
    ids=["data", "seed", "batch", "passes", "selectors"],
)
def test_a_file_of_something_else_is_not_continued(
    options: list[str], words: str, whole: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "s.qstats"
    shutil.copy(whole, out)
    assert call("calibrate", CNN, *COMMON, *options, "-o", out) == 3
    assert words in capsys.readouterr().err
    assert out.read_bytes() == whole.read_bytes()


def test_other_models_and_other_data_are_refused(whole: Path, tmp_path: Path, capsys: Capture) -> None:
    vit = ROOT / "models" / "vit_digits.onnx"
    assert call(vit, "--target", "ort", "--stats", whole, "-o", tmp_path / "q.onnx") == 3
    assert "is of another model" in capsys.readouterr().err
    assert call(CNN, "--target", "ort", "--stats", whole, "--calib", "random", "-o", tmp_path / "q.onnx") == 3
    assert "was gathered on other data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--resume"], 3, "there is nothing to resume"),
        (["--shard", "3/2"], 2, "is no shard; write I/N"),
        (["--shard", "1/9"], 3, "too few for 9 shards"),
        (["--workers", "2", "--dask", "local"], 2, "give one of them"),
    ],
    ids=["resume", "shard", "shards", "executors"],
)
def test_usage(options: list[str], code: int, words: str, tmp_path: Path, capsys: Capture) -> None:
    assert call("calibrate", CNN, *COMMON, *options, "-o", tmp_path / "s.qstats") == code
    assert words in capsys.readouterr().err


def test_batch_size(tmp_path: Path, capsys: Capture) -> None:
    """Recorded, and a fixed batch axis takes no other."""
    out = tmp_path / "s.qstats"
    assert call("calibrate", CNN, *COMMON, "--batch", 16, "-o", out) == 0
    assert load(out).key.batch == 16
    fixed = tmp_path / "fixed.onnx"
    proto = onnx.load(CNN)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    onnx.save(proto, fixed)
    assert call("calibrate", fixed, *COMMON, "--batch", 4, "-o", tmp_path / "f.qstats") == 2
    assert "--batch 4: the model takes exactly 8 samples a run; leave --batch out" in capsys.readouterr().err
    assert call("calibrate", fixed, *COMMON, "--batch", 8, "-o", tmp_path / "f.qstats") == 0


def test_dry_run_predicts_memory(capsys: Capture) -> None:
    assert call(CNN, *COMMON, "--dry-run") == 0
    assert "memory       the first sweep grows the process by at most" in capsys.readouterr().out
    assert call(CNN, *COMMON, "--dry-run", "--json", "--batch", 4, "--mem-limit", "1GiB") == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert (memory["batch"], memory["blocks"], memory["limit_bytes"]) == (4, 1, 1 << 30)
    assert [r["predicted_bytes"] < 1 << 30 for r in memory["runs"]] == [True]
    assert call(CNN, *COMMON, "--dry-run", "--mem-limit", "1MiB") == 2
    out, err = capsys.readouterr()
    assert not out and "no batch size fits; give at least" in err


def test_passes_that_read_nothing(tmp_path: Path) -> None:
    job = prepare(CNN, Options(target="ort", passes="canonicalize", exact=True, calib=str(DATA)))
    with pytest.raises(UsageError, match="read no statistics of this model"):
        calibrate(job, tmp_path / "s.qstats", Silent())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse", "weighted", "search"])
def test_ranges_by_every_method(method: str, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "q.onnx"
    words: list[Any] = [CNN, *COMMON, "--samples", 16, "--target", "trt", "--range", method, "--verify", "end", "-o", out]
    assert call(*words, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    used = {r["numbers"]["range"] for p in document["passes"] for r in p["remarks"] if "range" in r["numbers"]}
    expected = "mse" if method == "weighted" else method  # convolutions have no weights for each channel of a row
    assert used and (method == "search" or used == {expected}) and f"range={method}" in document["pipeline"]


def test_weighted_ranges_are_of_linear_layers(tmp_path: Path, capsys: Capture) -> None:
    vit = ROOT / "models" / "vit_digits.onnx"
    options = ["--range", "weighted", "--passes", "", "--samples", 16, "--verify", "end", "-o", tmp_path / "q.onnx"]
    assert call(vit, *options, "--threads", 1, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    used = [r["numbers"]["range"] for p in document["passes"] for r in p["remarks"] if "range" in r["numbers"]]
    assert used.count("weighted mse") > 20 and document["sqnr_db"] > 30


def test_range_and_annotate_must_agree(tmp_path: Path, capsys: Capture) -> None:
    assert call(CNN, *COMMON, "--passes", "annotate{range=mse}", "--range", "entropy", "-o", tmp_path / "q.onnx") == 2
    assert "--range entropy and annotate{range=mse} differ" in capsys.readouterr().err


def test_data_is_checked_in_every_command(tmp_path: Path, capsys: Capture) -> None:
    with np.load(DATA) as archive:
        x = archive["input"][:16].copy()
    x[3] = x[2]
    np.savez(tmp_path / "d.npz", input=x)
    told = "samples repeat another (sample 3 is sample 2)"
    options = ["--calib", tmp_path / "d.npz", "--target", "ort", "--threads", 1, "--json"]
    for words in (["calibrate", CNN, *options, "-o", tmp_path / "s.qstats"], [CNN, *options, "-o", tmp_path / "q.onnx"]):
        assert call(*words) == 0
        out, err = capsys.readouterr()
        document = json.loads(out)
        assert told in err and any(told in n for n in document.get("warnings", document.get("notes")))
    assert call("eval", CNN, tmp_path / "q.onnx", "--data", tmp_path / "d.npz", "--json") == 0
    out, err = capsys.readouterr()
    assert told in err and any(told in n for n in json.loads(out)["notes"])


def test_figures_are_of_samples_that_no_pass_saw(tmp_path: Path, capsys: Capture) -> None:
    """With the data, and from statistics, which keep the samples that were held back."""
    alone, stats = tmp_path / "m.onnx", tmp_path / "s.qstats"
    shutil.copy(CNN, alone)
    x = np.random.default_rng(0).standard_normal((24, 1, 32, 32)).astype(np.float32)
    np.savez(tmp_path / "d.npz", input=x)
    data = ["--calib", tmp_path / "d.npz"]
    assert call("calibrate", alone, *COMMON[:2], *data, "-o", stats) == 0
    capsys.readouterr()
    found = []
    for words in (data, ["--stats", stats], ["--stats", stats, *data]):
        assert call(alone, *COMMON[:2], *words, "-o", tmp_path / "q.onnx", "--json") == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [(f["samples"], f["measured_on"], f["held_back"]) for f in found] == [(21, 3, True)] * 3
    assert len({f["sqnr_db"] for f in found}) == 1


def test_too_few_samples_to_hold_some_back(tmp_path: Path, capsys: Capture) -> None:
    np.savez(tmp_path / "d.npz", input=np.random.default_rng(0).standard_normal((12, 1, 32, 32)).astype(np.float32))
    assert call(CNN, "--target", "ort", "--calib", tmp_path / "d.npz", "-o", tmp_path / "q.onnx") == 0
    assert "on 8 of the samples it was fitted to (too few to hold some back: give more)" in capsys.readouterr().out
