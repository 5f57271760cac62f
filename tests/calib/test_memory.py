from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from qcompile.calib.memory import plan
from qcompile.calib.observers import Histogram, MinMax, Probe, SecondMoment
from qcompile.errors import UsageError
from tests.calib.graphs import transformer
from tests.calib.test_reductions import held

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kilobytes on Linux")


def measured(kind: str, batch: int, limit: int, samples: int) -> dict[str, Any]:
    """Through a shell: ru_maxrss starts at the resident memory of the process that forks."""
    words = [sys.executable, "-m", "tests.calib.sweep_memory", kind, str(batch), str(limit), str(samples)]
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


def test_memory_does_not_grow_with_the_samples() -> None:
    few, many = (measured("histogram", 8, 0, n)["peak"] for n in (64, 1024))
    assert many <= 1.05 * few


def test_one_tensor_that_does_not_fit_is_refused_with_a_batch_that_does() -> None:
    model = transformer(dim=512)
    data = held({"ids": np.zeros((4096, 5), np.int64)})
    probes = [Probe("act", Histogram()), Probe("ln", MinMax())]
    fits = plan(model, data, probes, 512).predicted_bytes
    with pytest.raises(UsageError, match=r"'act' alone needs about \d+ MiB at batch 4096.*use batch \d+, or give"):
        plan(model, data, probes, 4096, fits)
    with pytest.raises(UsageError, match="no batch size fits; give at least"):
        plan(model, data, probes, 8, 1 << 20)


def test_a_tensors_probes_stay_together_and_all_are_answered() -> None:
    model = transformer(dim=64)
    data = held({"ids": np.zeros((64, 5), np.int64)})
    probes = [Probe(t, o) for t in ("h", "ln", "act", "res") for o in (MinMax(), SecondMoment())]
    one = max(plan(model, data, [p for p in probes if p.tensor == t], 64).predicted_bytes for t in ("h", "ln", "act", "res"))
    sweeps = plan(model, data, probes, 64, one).sweeps
    assert sorted(str(p) for s in sweeps for p in s.probes) == sorted(map(str, probes))
    assert all(s.predicted_bytes <= one for s in sweeps)
    assert not {p.tensor for p in sweeps[0].probes} & {p.tensor for p in sweeps[-1].probes}
