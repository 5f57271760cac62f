from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.calib.observe import Histogram, MinMax, Probe, SecondMoment
from qcompile.calib.sweep.memory import plan_memory, statistics_bytes, with_margin
from qcompile.errors import UsageError
from tests.calib.sweep.graphs import transformer
from tests.calib.sweep.test_reductions import held
from tools.bench_large import WORDS, write_transformer

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kilobytes on Linux")


def measured(kind: str, batch: int, limit: int, samples: int) -> dict[str, Any]:
    return run_module("sweep_memory", kind, batch, limit, samples)


def run_module(name: str, *arguments: object) -> dict[str, Any]:
    """Through a shell: ru_maxrss starts at the resident memory of the process that forks."""
    words = [sys.executable, "-m", f"tests.calib.sweep.{name}", *map(str, arguments)]
    done = subprocess.run(["sh", "-c", '"$@" && true', "sh", *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["minmax", "histogram", "second-moment", "rows"])
def test_the_prediction_is_kept(kind: str) -> None:
    found = measured(kind, 32, 0, 64)
    assert found["sweeps"] == 1
    assert found["grown"] <= found["predicted"]


@pytest.mark.parametrize("kind", ["histogram", "rows"])
def test_a_limit_is_kept_by_more_sweeps(kind: str) -> None:
    limit = 240 << 20
    found = measured(kind, 32, limit, 64)
    assert found["sweeps"] > 1
    assert found["grown"] <= limit


@pytest.fixture(scope="module")
def transformer_of_80_mb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformer")
    np.savez(folder / "data.npz", ids=np.random.default_rng(1).integers(0, WORDS, (64, 64)))
    return write_transformer(folder / "model.onnx", layers=6, width=512)


@pytest.mark.parametrize(("limit", "blocked"), [(0, False), (200 << 20, True)], ids=["whole", "in blocks"])
def test_what_dry_run_predicts_is_kept(limit: int, blocked: bool, transformer_of_80_mb: Path) -> None:
    """All probes of the default passes, on the command line's path; no more than twice what it takes."""
    found = run_module("first_sweep_memory", transformer_of_80_mb, transformer_of_80_mb.with_name("data.npz"), limit)
    assert (found["blocks"] > 1) == blocked
    assert found["grown"] <= found["predicted"] <= (limit or 2 * found["grown"])


def test_memory_does_not_grow_with_the_samples() -> None:
    """Under a limit that bounds nothing: without one the C library keeps freed pieces, more on a busy machine."""
    few, many = (measured("histogram", 8, 1 << 40, samples) for samples in (64, 1024))
    assert few["sweeps"] == many["sweeps"] == 1
    assert many["peak"] <= 1.05 * few["peak"]


def test_one_tensor_that_does_not_fit_is_refused_with_a_batch_that_does() -> None:
    model = transformer(dim=512)
    data = held({"ids": np.zeros((4096, 5), np.int64)})
    probes = [Probe("act", Histogram()), Probe("ln", MinMax())]
    fits = plan_memory(model, data, probes, 512).predicted_bytes
    with pytest.raises(UsageError, match=r"'act' alone needs about \d+ MiB at batch 4096.*use --batch \d+, or give"):
        plan_memory(model, data, probes, 4096, fits)
    with pytest.raises(UsageError, match="no batch size fits; give at least"):
        plan_memory(model, data, probes, 8, 1 << 20)


def test_a_tensors_probes_stay_together_and_all_are_answered() -> None:
    model = transformer(dim=64)
    data = held({"ids": np.zeros((64, 5), np.int64)})
    probes = [Probe(t, o) for t in ("h", "ln", "act", "res") for o in (MinMax(), SecondMoment())]
    tensors = ("h", "ln", "act", "res")
    one = max(plan_memory(model, data, [p for p in probes if p.tensor == t], 64).predicted_bytes for t in tensors)
    one += with_margin(statistics_bytes(model, probes))
    sweeps = plan_memory(model, data, probes, 64, one).sweeps
    assert sorted(str(p) for s in sweeps for p in s.probes) == sorted(map(str, probes))
    assert all(s.predicted_bytes <= one for s in sweeps)
    assert not {p.tensor for p in sweeps[0].probes} & {p.tensor for p in sweeps[-1].probes}
