"""noisy: offsets of a fraction of a step."""

from __future__ import annotations

import numpy as np

from qcompile.calib.observe import MinMax, Rows
from qcompile.calib.observe.change import FOLD_ROWS
from qcompile.ir.model import Model
from qcompile.pipeline import registry
from tests.passes.measures import outputs, sqnr_db
from tests.passes.models import Feeds, fixture, fixture_arrays
from tests.passes.running import context, pipeline, run_passes

NAME = "timm_vit_dy23"


def quantized(passes: str, scheme: str) -> float:
    arrays = fixture_arrays(NAME, samples=32)
    made, _ = pipeline(passes, fixture(NAME), arrays, context("trt", scheme))
    fresh = fixture_arrays(NAME, samples=32, seed=1)
    return sqnr_db(outputs(fixture(NAME), fresh)[0], outputs(made, fresh)[0])


def canonical(arrays: Feeds) -> Model:
    return run_passes(fixture(NAME), registry.parse("canonicalize"), arrays, context("trt", "w4a4"))[0]


def test_offsets_stay_within_a_step_and_are_undone() -> None:
    arrays = fixture_arrays(NAME)
    before = canonical(arrays)
    after, (report,) = run_passes(before, registry.parse("noisy"), arrays, context("trt", "w4a4"))
    assert report.modified and all(float(r.numbers["gain_db"]) > 0 for r in report.remarks if r.kind == "applied")
    a, b = outputs(before, arrays)[0], outputs(after, arrays)[0]
    assert np.abs(a - b).max() <= 5e-6 * np.abs(a).max()


def test_it_never_costs_what_the_grid_could_not_gain() -> None:
    plain, moved = quantized("", "w4a4"), quantized("noisy", "w4a4")
    assert moved > plain - 0.2, f"{plain:.2f} dB without, {moved:.2f} dB with it"


def test_a_site_that_refuses_a_shift_is_left_alone() -> None:
    arrays = fixture_arrays("hf_llama_dy23")
    before = run_passes(fixture("hf_llama_dy23"), registry.parse("canonicalize"), arrays, context("trt", "w4a4"))[0]
    _, (report,) = run_passes(before, registry.parse("noisy"), arrays, context("trt", "w4a4"))
    assert not report.modified and all(r.kind == "missed" and r.reason for r in report.remarks)


def test_its_statistics_follow_the_fold() -> None:
    """`annotate` behind it needs no other sweep: extremes and rows of the moved tensor are known."""
    asked = {type(observer) for observer in (MinMax(-1), Rows(FOLD_ROWS))}
    (p,) = registry.parse("noisy")
    model = canonical(fixture_arrays(NAME))
    probes = list(p.probes(model, context("trt", "w4a4")))
    assert probes and {type(x.observer) for x in probes} == asked and all(x.observer.follows for x in probes)
