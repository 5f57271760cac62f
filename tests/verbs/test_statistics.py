"""What a compilation is compared on."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile.execute.session import batch_length
from qcompile.ir.model import Model
from qcompile.verbs.compile import statistics
from qcompile.verbs.compile.job import prepare
from qcompile.verbs.compile.options import Options

CNN = Path(__file__).parents[2] / "models" / "digits_cnn.onnx"


@pytest.mark.parametrize(("megabytes", "samples"), [(1, 8), (128, 8), (346, 2), (7000, 2), (256, 4)])
def test_large_models_are_compared_on_fewer_samples(
    megabytes: int, samples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(CNN, Options(target="ort", output=tmp_path / "out.onnx"))
    data = statistics.open_data(job)
    assert data is not None
    monkeypatch.setattr(Model, "weight_bytes", lambda self: megabytes << 20)
    feeds = statistics._feeds(data, job.model)  # pyright: ignore[reportPrivateUsage]
    assert sum(batch_length(f) for f in feeds) == samples
