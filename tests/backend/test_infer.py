"""Running engines: the part that needs no GPU, on fake runners."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from qcompile.backend import refit, runner
from qcompile.backend.infer import made_up_feeds, measure, portable
from qcompile.backend.runner import EngineRuns, engine_target, run_engines
from qcompile.errors import BackendError, InputError, ModelError, UsageError
from qcompile.execute.timing import WARM_UP
from qcompile.verbs.bench import engines as engine_bench
from qcompile.verbs.bench.engines import bench_engines, distance
from tests.backend.fakes import FakeRunner
from tests.verbs import evaluation_graphs as graphs


def engine(path: Path, target: str | None = None, head: bytes = b"vtrt") -> Path:
    path.write_bytes(head + bytes(64))
    if target is not None:
        path.with_name(path.name + ".json").write_text(json.dumps({"target": target, "engine": {}}))
    return path


def test_outputs_are_saved_and_all_engines_timed(tmp_path: Path) -> None:
    runners = [FakeRunner(2.0), FakeRunner(3.0, np.float16)]
    times = measure(runners, tmp_path, 4, 0, lambda r, feeds: feeds)
    assert [len(t) for t in times] == [4, 4] and all(r.calls == 1 + WARM_UP + 4 for r in runners)
    x = np.load(tmp_path / "feeds.npz")["x"]
    assert x.shape == (3, 4) and x.dtype == np.float32
    assert np.array_equal(np.load(tmp_path / "0.npz")["y"], 2 * x)
    assert np.load(tmp_path / "1.npz")["y"].dtype == np.float16


def test_inputs_are_made_at_the_optimum_and_seeded() -> None:
    feeds = made_up_feeds(FakeRunner(1), 0)
    assert np.array_equal(feeds["x"], made_up_feeds(FakeRunner(1), 0)["x"])
    assert not np.array_equal(feeds["x"], made_up_feeds(FakeRunner(1), 1)["x"])
    assert made_up_feeds(FakeRunner(1, dims=(2, 4)), 0)["x"].shape == (2, 4)
    assert portable(np.ones(2, ml_dtypes.bfloat16)).dtype == np.float32


def test_no_gpu_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = engine(tmp_path / "m.engine")
    for room in (runner, refit):
        monkeypatch.setattr(room, "local_gpu", lambda: None)
    with pytest.raises(BackendError, match=r"running m\.engine needs an NVIDIA GPU.*this machine has none") as caught:
        bench_engines([path], runs=1)
    assert caught.value.exit_code == 4
    with pytest.raises(BackendError, match=r"refitting m\.engine needs an NVIDIA GPU"):
        refit.refit_engine(path, tmp_path / "m.onnx", tmp_path / "n.engine")


def test_which_backend_an_engine_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx, trt = engine(tmp_path / "a"), engine(tmp_path / "b", head=b"ptrt")
    assert [engine_target(p) for p in (rtx, trt, engine(tmp_path / "c", "trt", b"xxxx"))] == ["rtx", "trt", "trt"]
    with pytest.raises(ModelError, match="not a TensorRT engine"):
        engine_target(engine(tmp_path / "d", head=b"xxxx"))
    with pytest.raises(ModelError, match="no such file"):
        engine_target(tmp_path / "absent")
    monkeypatch.setattr(runner, "local_gpu", lambda: "sm89")
    with pytest.raises(UsageError, match="one backend"):
        run_engines([rtx, trt], runs=1, seed=0)


def test_an_engine_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = engine(tmp_path / "m.engine")
    monkeypatch.setattr(runner, "local_gpu", lambda: "sm89")
    monkeypatch.setattr(runner, "require_trt", lambda target: "tensorrt_rtx")
    reply = {"ok": False, "version": "1.7", "errors": ["wrong device"]}
    monkeypatch.setattr(runner, "ask_worker", lambda *a: reply)
    with pytest.raises(BackendError, match=r"1\.7 cannot run the engines on sm89: wrong device \(m\.engine has no manifest\)"):
        run_engines([path], runs=1, seed=0)
    reply["version"] = ""
    with pytest.raises(BackendError, match=r"does not load.*reinstall"):
        run_engines([path], runs=1, seed=0)


def test_bench_compares_with_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = graphs.float_model(tmp_path / "a.onnx")
    session = engine_bench.make_session(reference)
    feeds = {i.name: np.ones([d if isinstance(d, int) else 1 for d in i.shape], np.float32) for i in session.get_inputs()}
    exact = dict(zip((o.name for o in session.get_outputs()), session.run(None, feeds), strict=True))
    off = {n: 2 * np.asarray(x) for n, x in exact.items()}
    ran = EngineRuns("sm89", "tensorrt 11", feeds, (exact, off), ([2.0, 4.0], [1.0, 1.0]))
    monkeypatch.setattr(engine_bench, "run_engines", lambda *a, **k: ran)
    document = bench_engines([engine(tmp_path / "f.engine"), engine(tmp_path / "q.engine"), reference], runs=2).to_json()
    assert document["ratios"][1]["median"] == 3.0 and document["gpu"] == "sm89"
    first, second = document["compared"]
    assert first["relative_error"] == 0 and first["reference"] == str(reference)
    assert second["relative_error"] == pytest.approx(1) and second["cosine"] == pytest.approx(1)
    with pytest.raises(UsageError, match="at most one ONNX model"):
        bench_engines([tmp_path / "f.engine", reference, reference], runs=1)


def test_outputs_must_match() -> None:
    one = np.ones((2, 3))
    with pytest.raises(InputError, match="has the outputs z"):
        distance({"y": one}, {"z": one})
    with pytest.raises(InputError, match="output 'y' is"):
        distance({"y": one}, {"y": one[:1]})
