"""The contract of each kind of pass, for every registered pass on every model of the table: registering a pass tests it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.decide.decisions import decisions
from qcompile.execute.emulate.runnable import runnable
from qcompile.execute.session import make_session
from qcompile.ir.loosen import loosened
from qcompile.ir.model import Model
from qcompile.ir.text import print_model
from qcompile.pipeline import registry
from qcompile.pipeline.base import Kind, Stage
from qcompile.target.check import check
from tests.passes.contracts import MODELS, TABLE, Case, cases, changing, changing_cases, specs
from tests.passes.layers import layer_errors
from tests.passes.measures import constants_of, double_outputs, outputs, relative_error, sqnr_db, to_double
from tests.passes.models import QUANTIZED, fixture, fixture_arrays
from tests.passes.running import Step, SweepOf, context, fixture_step, pipeline, run_passes, run_with

FLOAT32, FLOAT64 = 5e-6, 1e-12
LEAST_MODELS = 3


@pytest.mark.parametrize("case", cases(*Kind), ids=str)
def test_what_is_reported_is_what_happened(case: Case) -> None:
    """Nodes, constants and decisions stay as they are, or the table says that this pass changes this model."""
    done = case.run()
    kinds = [r.kind for r in done.report.remarks]
    assert done.changed == (case in changing()), "if that is meant: python tools/update_goldens.py --contracts"
    assert done.report.modified == done.changed, "`modified` must mean that nodes, constants or decisions changed"
    assert kinds, "each pass says what it did, or why it did nothing"
    assert "applied" in kinds or not done.report.modified
    assert all(r.reason and r.pass_name == case.spec.partition("{")[0] for r in done.report.remarks)


@pytest.mark.parametrize("spec", specs(*Kind))
def test_every_pass_changes_some_models(spec: str) -> None:
    """Otherwise the other tests of this pass say little: add a small model to tests/passes/graphs."""
    assert len({case.model for case in changing() if case.spec == spec}) >= LEAST_MODELS


def test_the_table_has_a_row_a_pass_and_a_column_a_model() -> None:
    lines = [[cell.strip() for cell in line.split("|")] for line in TABLE.read_text(encoding="utf-8").splitlines()]
    assert lines[0][1:] == list(MODELS) and [line[0] for line in lines[1:]] == specs(*Kind)


# EQUIVALENT

_MEASURED: dict[tuple[object, ...], float] = {}


def once(measure: Callable[[Case, Step], float], case: Case) -> float:
    """A measurement; targets for which the same model becomes the same model share it."""
    done = case.run()
    key = (measure, case.model, *done.digests)
    if key not in _MEASURED:
        _MEASURED[key] = measure(case, done)
    return _MEASURED[key]


def float32_error(case: Case, done: Step) -> float:
    arrays = fixture_arrays(case.model, seed=1)
    return relative_error(outputs(done.before, arrays), outputs(done.after, arrays))


def float64_error(case: Case, done: Step) -> float:
    arrays, before = fixture_arrays(case.model), to_double(done.before)
    spec = "canonicalize{widen=false}" if case.spec == "canonicalize" else case.spec
    after, _ = run_with(SweepOf(done.before, arrays).collect, before, registry.parse(spec), context(case.target))
    feeds = {n: a[:2] for n, a in arrays.items()}
    got = double_outputs(after, feeds)
    assert all(a.dtype == np.float64 for a in got if a.dtype.kind == "f")
    return relative_error(double_outputs(before, feeds), got)


def on_floats(kind: Kind) -> list[Case]:
    """What rounds in between is compared without that."""
    return [case for case in changing_cases(kind) if case.model not in QUANTIZED]


@pytest.mark.parametrize("case", [c for c in changing_cases(Kind.EQUIVALENT) if c.spec == "unify-qdq"], ids=str)
def test_unified_quantizers_keep_the_outputs(case: Case) -> None:
    done, arrays = case.run(), fixture_arrays(case.model, seed=1)
    assert relative_error(outputs(loosened(done.before), arrays), outputs(loosened(done.after), arrays)) <= FLOAT32


@pytest.mark.parametrize("case", on_floats(Kind.EQUIVALENT), ids=str)
def test_equivalent_passes_keep_the_outputs(case: Case) -> None:
    assert once(float32_error, case) <= FLOAT32


@pytest.mark.parametrize("case", on_floats(Kind.EQUIVALENT), ids=str)
def test_equivalent_passes_are_exact_in_float64(case: Case) -> None:
    assert once(float64_error, case) <= FLOAT64


# ANNOTATE


@pytest.mark.parametrize("case", on_floats(Kind.ANNOTATE), ids=str)
def test_annotations_leave_the_graph_alone(case: Case) -> None:
    done = case.run()
    assert print_model(done.before) == print_model(done.after)
    before, after = constants_of(done.before), constants_of(done.after)
    assert before.keys() == after.keys() and all(np.array_equal(before[n], after[n]) for n in before)


# FIT


def fits() -> list[Case]:
    """Cases of passes that lower quantization errors: two exported models, and every small one.

    bias-reparam's bias belongs to the shifted codes of its input: fit/test_bias_reparam.py compares the two together.
    """
    exported = {"timm_vit_shared_ts17", "hf_llama_dy23"}
    chosen = [c for c in changing_cases(Kind.FIT) if c.model in exported or len(MODELS[c.model]) > 1]
    return [c for c in chosen if c.spec != "bias-reparam"]


@pytest.mark.parametrize("case", fits(), ids=str)
@pytest.mark.parametrize("scheme", ["w4a8", "w8a8"])
def test_fits_do_not_raise_a_layers_error(case: Case, scheme: str) -> None:
    arrays, ctx = fixture_arrays(case.model), context(case.target, scheme)
    done = fixture_step(case.model, case.spec, case.target, scheme)
    if registry.parse(case.spec)[0].needs < Stage.DECIDED:
        assert relative_error(outputs(done.before, arrays), outputs(done.after, arrays)) <= FLOAT32, "on calibration data"
        return
    float_model = fixture_step(case.model, "annotate", case.target, scheme).after
    default, _ = run_passes(float_model, registry.parse("rtn{clip=none}"), arrays, ctx)
    before, after = layer_errors(default, float_model, arrays), layer_errors(done.after, float_model, arrays)
    assert before.keys() == after.keys() and before
    worse = {n: (before[n], after[n]) for n in before if after[n] > before[n] * (1 + 1e-3)}
    assert not worse, "squared error of the default, and of the pass"


# LOWER


@pytest.mark.parametrize("case", [c for c in changing_cases(Kind.LOWER) if c.spec in ("insert-qdq", "integer")], ids=str)
def test_lowering_leaves_no_decision_behind(case: Case) -> None:
    done = case.run()
    assert list(decisions(done.before.graph)) and not list(decisions(done.after.graph))


LOWERED = ("timm_vit_dy23", "hf_bert_shared_ts14", "hybrid_ts17", "stem")
SQNR_DB: dict[tuple[str, str], tuple[float, ...]] = {
    ("trt", "w8a8"): (32.3, 43.2, 39.6, 43.0),
    ("trt", "fp16"): (63.7, 60.9, 62.6, 68.7),
    ("rtx", "fp8"): (23.0, 32.1, 24.2, 32.9),
    ("trt", "w4a16"): (16.2, 26.0, 24.1, 69.6),
    ("trt", "nvfp4"): (19.3, 32.0, 21.8, 32.9),
    ("rtx", "nvfp4"): (19.3, 32.0, 21.8, 32.9),
    ("trt", "mxfp8"): (19.4, 32.1, 24.8, 32.9),
    ("rtx", "w6a6"): (18.1, 31.2, 24.4, 25.6),
    ("ort", "w8a8"): (31.0, 79.7, 40.2, 43.8),
    ("ort", "w4a4"): (9.0, 19.3, 16.5, 17.1),
    ("ort", "w4a16"): (16.2, 26.0, 24.1, 27.4),
    ("ort", "fp16"): (63.7, 60.9, 62.6, 68.7),
    ("integer", "w8a8"): (30.3, 40.1, 37.3, 41.1),
}  # measured, model by model
MARGIN_DB = 1.0  # kernels round differently from machine to machine


@pytest.mark.parametrize("name", LOWERED)
@pytest.mark.parametrize(("target", "scheme"), SQNR_DB)
def test_lowered_models_are_legal_and_load(target: str, scheme: str, name: str) -> None:
    arrays = fixture_arrays(name)
    model, _ = pipeline("", fixture(name), arrays, context(target, scheme))
    errors = [f for f in check(model.to_proto(), target) if f.severity == "error"]
    assert not errors
    data = runnable(model).to_proto().SerializeToString()
    for level in ("off", "basic", "all"):
        make_session(data, optimize=level, qdq_fusion=target == "ort", threads=1)  # type: ignore[arg-type]
    assert interface(model) == interface(fixture(name))
    measured = sqnr_db(outputs(fixture(name), arrays)[0], outputs(model, arrays)[0])
    assert measured > SQNR_DB[target, scheme][LOWERED.index(name)] - MARGIN_DB


def interface(model: Model) -> list[tuple[str | None, ir.DataType | None]]:
    return [(v.name, v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)]
