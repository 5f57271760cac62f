"""`--dry-run`: the sweeps that it announces are those of the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qcompile.pipeline import registry
from qcompile.report import Silent
from qcompile.verbs.calibrate.run import calibrate
from qcompile.verbs.compile.job import prepare
from qcompile.verbs.compile.options import Options
from qcompile.verbs.compile.rehearse import rehearse
from qcompile.verbs.compile.run import run
from tests.structure.exports import FOLDER, INDEX

CNN = Path(__file__).parents[2] / "models" / "digits_cnn.onnx"
VIT = FOLDER / INDEX["timm_vit_dy23"]["file"]
OTHERS = ["", "repq,smooth", "smooth{search},bias-correct", "rotate,center,smooth", "bias-correct{mode=sequential}"]


def announced_and_made(model: Path, folder: Path, **options: object) -> tuple[int, int]:
    job = prepare(model, replace(Options(**options), output=folder / "out.onnx", verify="off", samples=16))  # type: ignore[arg-type]
    return len(rehearse(job).sweeps), run(job, Silent()).sweeps


@pytest.mark.parametrize("passes", [*registry.PRESETS, *OTHERS])
@pytest.mark.parametrize("target", ["ort", "trt"])
def test_every_pipeline_of_a_transformer(passes: str, target: str, tmp_path: Path) -> None:
    announced, made = announced_and_made(VIT, tmp_path, passes=passes, target=target, calib="random")
    assert announced == made


@pytest.mark.parametrize("passes", ["dfq", "equalize,bias-correct", "bias-correct{mode=sequential}", "split-shortcut,smooth"])
def test_convolutions(passes: str, tmp_path: Path) -> None:
    announced, made = announced_and_made(CNN, tmp_path, passes=passes, target="ort")
    assert announced == made and (made > 3) == ("sequential" in passes)


def test_a_statistics_file_saves_sweeps_that_are_not_announced(tmp_path: Path) -> None:
    job = prepare(CNN, Options(passes="smooth", target="ort", output=tmp_path / "out.onnx", samples=16, verify="off"))
    calibrate(job, tmp_path / "stats.qcstats", Silent())
    announced, made = announced_and_made(CNN, tmp_path, passes="smooth", target="ort", stats=tmp_path / "stats.qcstats")
    assert announced == made == 0
