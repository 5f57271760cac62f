from __future__ import annotations

from pathlib import Path

import pytest

from qcompile.ir.model import Model
from qcompile.pipeline import registry
from qcompile.pipeline.spec import format_pipeline
from qcompile.verbs.compile.run import compile as compile_model
from tests.passes.equivalent import streams
from tests.passes.measures import outputs, sqnr_db
from tests.passes.models import fixture, fixture_arrays
from tests.passes.running import context, pipeline

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs/guide/presets.md"
NATURAL = {
    "repq-vit": "timm_vit_shared_ts17",
    "quarot": "hf_llama_dy23",
    "quantvggt": "timm_vit_shared_ts17",
    "mambaquant": "timm_vit_dy23",
    "dfq": "stem",
}
APPLIED = {
    "repq-vit": ("repq", "log2-softmax"),
    "quarot": ("rotate",),
    "quantvggt": ("rotate", "smooth"),
    "mambaquant": ("rotate", "smooth"),
    "dfq": ("equalize", "bias-correct"),
}


@pytest.mark.parametrize("name", sorted(registry.PRESETS))
def test_presets_expand_to_a_pipeline_that_prints_back(name: str) -> None:
    passes = registry.parse(name)
    assert passes and registry.parse(format_pipeline(passes)) == passes
    assert format_pipeline(registry.parse(f"{name},fold-bn")).endswith("fold-bn")


@pytest.mark.parametrize("name", sorted(registry.PRESETS))
def test_every_preset_is_in_the_guide(name: str) -> None:
    assert f"| `{name}` | `{registry.PRESETS[name]}` |" in GUIDE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(NATURAL))
def test_presets_work_on_their_natural_models(name: str) -> None:
    model, feeds = fixture(NATURAL[name]), fixture_arrays(NATURAL[name])
    after, reports = pipeline(name, model, feeds, context("ort", "w6a6"))
    for p in APPLIED[name]:
        (report,) = [r for r in reports if r.spec.partition("{")[0] == p]
        weighed = [r for r in report.remarks if r.kind == "applied" or "held-out rows" in r.reason]
        assert weighed, f"{p}: folds need not pay on random data, but they must be weighed"
    assert sqnr_db(outputs(model, feeds)[0], outputs(after, feeds)[0]) > 5


@pytest.mark.parametrize("name", sorted(registry.PRESETS))
def test_every_preset_compiles_a_trained_model_and_is_stored_expanded(name: str, tmp_path: Path) -> None:
    source, out = ROOT / "models" / ("digits_cnn.onnx" if name == "dfq" else "vit_digits.onnx"), tmp_path / "m.onnx"
    done = compile_model(source, output=out, passes=name, target="ort", scheme="w8a8", samples=8, threads=1, verify="end")
    stored = Model.load(out).metadata["qcompile.pipeline"]
    assert all(spec in stored for spec in format_pipeline(registry.parse(registry.PRESETS[name])).split(","))
    assert done.compared is not None and done.compared.sqnr_db is not None and done.compared.sqnr_db > 15


def test_quarot_spreads_a_layer_norm_stream() -> None:
    after, reports = pipeline("quarot", streams.block(), streams.feeds(), context("ort", "w8a8"))
    (report,) = [r for r in reports if r.spec.startswith("rotate")]
    assert any("they are RMSNorms now" in r.reason for r in report.remarks if r.kind == "applied")
    assert sqnr_db(outputs(streams.block(), streams.feeds())[0], outputs(after, streams.feeds())[0]) > 20
