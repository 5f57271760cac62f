from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper

from qcompile.ir.model import Model
from qcompile.pipeline import registry
from tests.passes.measures import constants_of, op_types, outputs, relative_error, sqnr_db
from tests.passes.models import biased, built
from tests.passes.running import context, pipeline, run_passes

node = helper.make_node


def arrays(samples: int = 16, seed: int = 0) -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(seed).standard_normal((samples, 3, 16, 16)).astype(np.float32)}


def absorbed(model: Model, spec: str = "absorb-bias", **options: Any) -> tuple[Model, Model, list[Any]]:
    """The model in front, behind, and what was said."""
    before, _ = run_passes(model, registry.parse("canonicalize,fold-bn,fold-pad"), arrays(), context(**options))
    after, (report,) = run_passes(before, registry.parse(spec), arrays(), context(**options))
    return before, after, list(report.remarks)


def mlp(form: str) -> Model:
    """Linear -> Relu -> Linear, as Gemm or as MatMul + Add."""
    rng = np.random.default_rng(1)
    held = {n: (rng.standard_normal(s) * 0.2).astype(np.float32) for n, s in {"w1": (16, 8), "w2": (8, 4), "c2": (4,)}.items()}
    held["c1"] = np.linspace(0, 6, 8).astype(np.float32)
    if form == "gemm":
        first, second = (
            [node("Gemm", ["x", "w1", "c1"], ["z"], name="first")],
            [node("Gemm", ["r", "w2", "c2"], ["y"], name="second")],
        )
    else:
        first = [node("MatMul", ["x", "w1"], ["m"], name="first"), node("Add", ["m", "c1"], ["z"], name="first_bias")]
        second = [node("MatMul", ["r", "w2"], ["n"], name="second"), node("Add", ["n", "c2"], ["y"], name="second_bias")]
    return built(
        [*first, node("Relu", ["z"], ["r"], name="act"), *second], ["N", 16] if form == "gemm" else ["N", 3, 16, 16], held
    )


@pytest.mark.parametrize("act", ["Relu", "Clip"])
def test_calibration_outputs_stay_and_channels_reach_zero(act: str) -> None:
    before, after, remarks = absorbed(biased(act))
    assert [(r.kind, r.node) for r in remarks] == [("applied", "first")] and remarks[0].numbers["channels"] == 4
    assert relative_error(outputs(before, arrays()), outputs(after, arrays())) < 2e-6
    exposed = after.clone()
    exposed.graph.outputs[0] = next(n.inputs[0] for n in exposed.graph if n.name == "second")  # type: ignore[call-overload]
    assert np.abs(outputs(exposed, arrays())[0].min((0, 2, 3))).max() < 1e-5


def test_relu6_keeps_its_bound() -> None:
    _, after, remarks = absorbed(biased("Clip"))
    assert op_types(after) == ["Conv", "Relu", "Min", "Conv"]
    (cap,) = [a for n, a in constants_of(after).items() if "cap" in n]
    assert cap.shape == (1, 8, 1, 1) and np.isclose(6 - cap.min(), remarks[0].numbers["largest"])


def test_the_bound_that_equalize_left_is_lowered_too() -> None:
    before, _ = run_passes(biased("Clip"), registry.parse("canonicalize,fold-bn,equalize{center=false}"), arrays(), context())
    after, (report,) = run_passes(before, registry.parse("absorb-bias"), arrays(), context())
    assert op_types(before) == op_types(after) == ["Conv", "Relu", "Min", "Conv"] and report.modified
    assert relative_error(outputs(before, arrays()), outputs(after, arrays())) < 2e-6


def test_batch_norm_says_how_much_without_data() -> None:
    before, after, remarks = absorbed(biased(), "absorb-bias{by=bn}")
    assert np.isclose(remarks[0].numbers["largest"], 4 - 3 * 0.3) and remarks[0].numbers["channels"] == 4
    error = relative_error(outputs(before, arrays()), outputs(after, arrays()))
    assert 1e-6 < error < 0.05, "0.1 % of a normal channel lies below beta - 3 gamma"


@pytest.mark.parametrize("form", ["gemm", "matmul"])
def test_linear_layers(form: str) -> None:
    model = mlp(form)
    feeds = {"x": np.random.default_rng(0).standard_normal((16, 16) if form == "gemm" else (4, 3, 16, 16)).astype(np.float32)}
    after, (_, report) = run_passes(model, registry.parse("canonicalize,absorb-bias"), feeds, context())
    assert [r.node for r in report.remarks if r.kind == "applied"] == ["first"]
    assert relative_error(outputs(model, feeds), outputs(after, feeds)) < 2e-6


def test_quantized_layers_gain() -> None:
    found = {}
    for spec in ("", "absorb-bias"):
        after, _ = pipeline(spec, biased(), arrays(), context("ort", "w8a8"))
        found[spec] = sqnr_db(outputs(biased(), arrays(16, 1))[0], outputs(after, arrays(16, 1))[0])
    assert found["absorb-bias"] > found[""] + 3.0, found


def padded() -> Model:
    return changed(pads=[1, 1, 1, 1])


def changed(act: str = "Relu", branch: bool = False, **attributes: Any) -> Model:
    rng = np.random.default_rng(1)
    held = {n: (rng.standard_normal(s) * 0.2).astype(np.float32) for n, s in {"w1": (8, 3, 1, 1), "w2": (6, 8, 3, 3)}.items()}
    held["c1"] = np.full(8, 9, np.float32)
    nodes = [
        node("Conv", ["x", "w1", "c1"], ["z"], name="first"),
        node(act, ["z"], ["r"], name="act"),
        node("Conv", ["r", "w2"], ["y"], name="second", **attributes),
        *([node("Sigmoid", ["z"], ["y2"], name="branch")] if branch else []),
    ]
    return built(nodes, ["N", 3, 16, 16], held, outs=["y", "y2"] if branch else ["y"])


def low() -> Model:
    model = biased()
    return run_passes(model, registry.parse("canonicalize,fold-bn,absorb-bias"), arrays(), context())[0]


@pytest.mark.parametrize(
    ("model", "spec", "words"),
    [
        (padded(), "absorb-bias", "Conv second pads with zeros"),
        (changed(branch=True), "absorb-bias", "its output has other readers than Relu act"),
        (changed(), "absorb-bias{by=bn}", "no BatchNormalization says how small it gets"),
        (low(), "absorb-bias", "no channel stays above 0"),
    ],
    ids=["padding", "another reader", "no statistics", "nothing to absorb"],
)
def test_refusals_leave_the_model_alone(model: Model, spec: str, words: str) -> None:
    before, after, remarks = absorbed(model, spec)
    assert after.digest() == before.digest()
    assert [(r.kind, r.node) for r in remarks] == [("missed", "first")] and words in remarks[0].reason


def test_other_activations_are_no_site() -> None:
    _, _, remarks = absorbed(changed("Sigmoid"))
    assert [(r.kind, r.reason) for r in remarks] == [("note", "no site matched")]


def test_selectors_keep_a_pair() -> None:
    _, _, remarks = absorbed(biased(), keep_float=("second",))
    assert [(r.kind, r.node) for r in remarks] == [("missed", "first")] and "--keep-float" in remarks[0].reason
