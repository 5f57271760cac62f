"""NVFP4 and MXFP8 through the public API: compiled, compared, evaluated, and not timed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qcompile.calib.data import load_data
from qcompile.errors import ModelError
from qcompile.ir.model import Model
from qcompile.verbs.bench.models import bench
from qcompile.verbs.compile.options import Options
from qcompile.verbs.compile.run import Result, compile
from qcompile.verbs.evaluate.outputs import evaluate
from tests.passes.models import fixture, fixture_arrays

NAME = "timm_vit_dy23"


@pytest.fixture(scope="module", params=["nvfp4", "mxfp8"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp(request.param)
    fixture(NAME).save(folder / "m.onnx")
    arrays: dict[str, Any] = dict(fixture_arrays(NAME, 16))
    np.savez(folder / "m.calib.npz", **arrays)
    options = Options(target="rtx", scheme=request.param, output=folder / "q.onnx", threads=1)
    return folder, compile(folder / "m.onnx", options)


def test_every_lowering_step_was_compared_with_the_float_model(done: tuple[Path, Result]) -> None:
    _, result = done
    lowered = [p for p in result.passes if p.kind == "lower" and p.modified]
    assert lowered and all(p.verified == "compared with the float model" for p in lowered)
    assert result.sqnr_db is not None and result.sqnr_db > 5


def test_mxfp8_says_that_the_engine_multiplies_in_float(done: tuple[Path, Result]) -> None:
    _, result = done
    assert any("multiplies in float" in note for note in result.notes) == (result.scheme == "mxfp8")


def test_eval_simulates_it(done: tuple[Path, Result]) -> None:
    folder, result = done
    data = load_data(str(folder / "m.calib.npz"), Model.load(folder / "m.onnx").inputs(), None, 8, 0)
    found = evaluate(folder / "m.onnx", folder / "q.onnx", data, per_layer=True, threads=1)
    assert found.simulated is True
    assert found.sqnr_db == pytest.approx(result.sqnr_db, abs=6)
    assert found.per_layer and all(np.isfinite(row.sqnr_db) for row in found.per_layer)


def test_bench_refuses_it(done: tuple[Path, Result]) -> None:
    folder, _ = done
    with pytest.raises(ModelError, match=r"no kernels for.*qcompile eval"):
        bench([folder / "m.onnx", folder / "q.onnx"])


def test_the_file_is_valid_onnx(done: tuple[Path, Result]) -> None:
    folder, _ = done
    onnx.checker.check_model(str(folder / "q.onnx"))
