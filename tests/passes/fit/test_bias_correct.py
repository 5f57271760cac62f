"""Means of quantized layers after the correction: measured, in order, and from BatchNormalization alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper

from qcompile.decide.decisions import decisions
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array
from qcompile.passes.fit.bias_correct.bn_means import expected
from qcompile.pipeline import registry
from qcompile.pipeline.runner import Runner, drive
from tests.passes.measures import constants_of, outputs
from tests.passes.models import biased, built
from tests.passes.running import context, run_passes

node = helper.make_node
SIDE = 12


def arrays(samples: int = 16, seed: int = 0) -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(seed).standard_normal((samples, 3, SIDE, SIDE)).astype(np.float32)}


def deep(bias: bool = True) -> Model:
    """Four convolutions and a Gemm; two branches of one depth are added."""
    rng = np.random.default_rng(2)
    shapes = {"w1": (8, 3, 3, 3), "w2": (8, 8, 3, 3), "w3": (8, 8, 1, 1), "w4": (8, 1, 3, 3), "w5": (8, 5), "c5": (5,)}
    held: dict[str, Any] = {n: (rng.standard_normal(s) * 0.4).astype(np.float32) for n, s in shapes.items()}
    held |= {f"c{i}": rng.standard_normal(8).astype(np.float32) for i in (1, 2, 3, 4)} if bias else {}
    c = (lambda i: [f"c{i}"]) if bias else (lambda i: [])
    nodes = [
        node("Conv", ["x", "w1", *c(1)], ["z1"], name="first"),
        node("Relu", ["z1"], ["a1"], name="relu1"),
        node("Conv", ["a1", "w2", *c(2)], ["z2"], name="left", pads=[1, 1, 1, 1]),
        node("Conv", ["a1", "w3", *c(3)], ["z3"], name="right"),
        node("Add", ["z2", "z3"], ["s"], name="sum"),
        node("Relu", ["s"], ["a2"], name="relu2"),
        node("Conv", ["a2", "w4", *c(4)], ["z4"], name="depthwise", group=8),
        node("Relu", ["z4"], ["a4"], name="relu4"),
        node("GlobalAveragePool", ["a4"], ["p"], name="pool"),
        node("Flatten", ["p"], ["f"], name="flat"),
        node("Gemm", ["f", "w5", "c5"], ["y"], name="head"),
    ]
    return built(nodes, ["N", 3, SIDE, SIDE], held)


LAYERS = ("first", "left", "right", "depthwise", "head")


def layer_outputs(model: Model, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
    """The output of every layer by its node's name, channels last."""
    exposed = model.clone()
    exposed.graph.outputs.clear()
    exposed.graph.outputs.extend(next(n for n in exposed.graph if n.name == name).outputs[0] for name in LAYERS)
    found = (np.moveaxis(a.astype(np.float64), 1, -1) for a in outputs(exposed, feeds))
    return {name: a.reshape(-1, a.shape[-1]) for name, a in zip(LAYERS, found, strict=True)}


def corrected(model: Model, mode: str, target: str = "trt", scheme: str = "w4a8") -> tuple[Model, list[Any]]:
    """Q/DQ in float32."""
    correction = f"bias-correct{{mode={mode}}}," if mode else ""
    passes = registry.parse(f"canonicalize,opset,annotate,rtn,{correction}insert-qdq")
    after, reports = run_passes(model, passes, arrays(), context(target, scheme, quantize=LAYERS))
    return after, [r for x in reports for r in x.remarks if r.pass_name == "bias-correct"]


@pytest.mark.parametrize(
    ("target", "scheme"), [("trt", "w4a8"), ("trt", "w8a8"), ("ort", "w8a8"), ("ort", "w4a4"), ("rtx", "fp8")]
)
def test_in_order_every_quantized_layer_keeps_its_mean(target: str, scheme: str) -> None:
    """Weights and activations in front are rounded, and still the mean output error is < 1e-5 of the output's deviation."""
    model = deep()
    after, remarks = corrected(model, "sequential", target, scheme)
    assert {r.node: r.kind for r in remarks} == dict.fromkeys(LAYERS, "applied")
    true, got = layer_outputs(model, arrays()), layer_outputs(after, arrays())
    worst = {n: float(np.abs((got[n] - true[n]).mean(0) / true[n].std(0)).max()) for n in LAYERS}
    assert max(worst.values()) < 1e-5, worst


def test_other_modes_leave_a_mean_error_behind_quantized_layers() -> None:
    model, errors = deep(), {}
    true = layer_outputs(model, arrays())["head"].mean(0)
    for mode in ("", "empirical", "sequential"):
        errors[mode] = float(np.abs(layer_outputs(corrected(model, mode)[0], arrays())["head"].mean(0) - true).max())
    assert errors["sequential"] < 0.01 * errors["empirical"] < 0.01 * errors[""], errors


def test_measured_means_correct_the_rounding_of_the_weight() -> None:
    """c' - c = -(Q(W) - W) E[x]: for the float input the mean output error is 0."""
    ctx, model = context("trt", "w4a8"), deep()
    before, _ = run_passes(model, registry.parse("canonicalize,opset,annotate,rtn"), arrays(), ctx)
    after, _ = run_passes(before, registry.parse("bias-correct"), arrays(), ctx)
    ((w, b, d),) = [(n.inputs[1], n.inputs[2], d) for n, slot, d in decisions(after.graph) if n.name == "right" and slot == 1]
    weight = const_array(w)
    assert weight is not None
    hidden = np.maximum(layer_outputs(model, arrays())["first"], 0)
    error = hidden @ (d.rounded(weight) - weight)[:, :, 0, 0].astype(np.float64).T
    shift = np.asarray(const_array(b), np.float64) - constants_of(model)["c3"]
    assert np.abs(error.mean(0) + shift).max() < 1e-5 * layer_outputs(model, arrays())["right"].std(0).max()


# ---- BatchNormalization ---------------------------------------------------------------------------------------------


def normal_net(act: str = "Relu") -> Model:
    """Conv -> BN -> act, twice, their sum -> Relu -> pool -> Flatten -> Gemm; BN knows the true moments."""
    rng = np.random.default_rng(4)
    held: dict[str, Any] = {"w5": rng.standard_normal((8, 5)).astype(np.float32), "c5": rng.standard_normal(5).astype(np.float32)}
    held |= {"zero": np.float32(0), "six": np.float32(6), "cut": np.float32(rng.uniform(1, 2, (8, 1, 1)))}
    nodes = []
    extra = {"Clip": ["zero", "six"], "Min": ["cut"]}.get(act, [])
    for i in (1, 2):
        w = rng.standard_normal((8, 3, 1, 1)).astype(np.float32)
        held |= {f"w{i}": w, f"mu{i}": np.zeros(8, np.float32), f"v{i}": np.square(w).sum((1, 2, 3))}
        held |= {f"g{i}": rng.uniform(0.5, 3, 8).astype(np.float32), f"b{i}": rng.standard_normal(8).astype(np.float32) * 2}
        nodes += [
            node("Conv", ["x", f"w{i}"], [f"z{i}"], name=f"conv{i}"),
            node("BatchNormalization", [f"z{i}", f"g{i}", f"b{i}", f"mu{i}", f"v{i}"], [f"n{i}"], name=f"bn{i}"),
            node(act, [f"n{i}", *extra], [f"a{i}"], name=f"act{i}"),
        ]
    nodes += [
        node("Add", ["n1", "a2"], ["s"], name="sum"),
        node("Relu", ["s"], ["r"], name="relu"),
        node("GlobalAveragePool", ["a1"], ["p"], name="pool"),
        node("Flatten", ["p"], ["f"], name="flat"),
        node("Gemm", ["f", "w5", "c5"], ["y"], name="head"),
    ]
    read = {v for n in nodes for v in n.input}
    return built(nodes, ["N", 3, SIDE, SIDE], {k: v for k, v in held.items() if k in read}, outs=["y", "s", "r"])


@pytest.mark.parametrize("act", ["Relu", "Clip", "Min"])
@pytest.mark.parametrize("tensor", ["a1", "a2", "s", "r", "f"])
def test_expected_values_are_those_of_normal_data(act: str, tensor: str) -> None:
    """The inputs are normal, so BatchNormalization's statistics are true; only the sum's operands are not independent."""
    model, _ = run_passes(normal_net(act), registry.parse("canonicalize,fold-bn"), arrays(), context())
    value = next(v for n in model.graph for v in n.outputs if v.name == tensor)
    found = expected(value)
    exposed = model.clone()
    exposed.graph.outputs.clear()
    exposed.graph.outputs.append(next(v for n in exposed.graph for v in n.outputs if v.name == tensor))
    y = np.moveaxis(outputs(exposed, arrays(64))[0], 1, -1).reshape(-1, 8)
    assert found is not None
    assert np.allclose(found.mean, y.mean(0), atol=0.35 if tensor == "r" else 0.08)
    assert tensor in "srf" or np.allclose(found.std, y.std(0), atol=0.08)


@pytest.mark.parametrize(
    "passes", ["", "equalize{by=weights center=false steps=16}", "equalize", "absorb-bias{by=bn}", "equalize,absorb-bias{by=bn}"]
)
@pytest.mark.parametrize("act", ["Relu", "Clip"])
def test_statistics_follow_the_channels(passes: str, act: str) -> None:
    """Whatever moved the channels, E[x] is still that of the tensor in front of the second layer."""
    model, _ = run_passes(
        biased(act), registry.parse(f"canonicalize,fold-bn{',' * bool(passes)}{passes}"), wide(32), context("trt")
    )
    second = next(n for n in model.graph if n.name == "second")
    found = expected(second.inputs[0])
    exposed = model.clone()
    tensor = next(n for n in exposed.graph if n.name == "second").inputs[0]
    assert found is not None and tensor is not None
    exposed.graph.outputs.clear()
    exposed.graph.outputs.append(tensor)
    y = np.moveaxis(outputs(exposed, wide(32))[0], 1, -1).reshape(-1, 8)
    assert np.allclose(found.mean, y.mean(0), rtol=0.02, atol=0.02 * y.std())


def wide(samples: int) -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(1).standard_normal((samples, 3, 16, 16)).astype(np.float32)}


def test_batch_norm_means_need_no_data_and_agree_with_measured_ones() -> None:
    ctx = context("trt", "w4a8", quantize=("first", "second"))
    before, _ = run_passes(biased(), registry.parse("canonicalize,opset,fold-bn,annotate,rtn"), wide(32), ctx)
    analytic, (report,) = drive(Runner(verify="off").steps(before, registry.parse("bias-correct{mode=bn}"), ctx))
    measured, _ = run_passes(before, registry.parse("bias-correct"), wide(32), ctx)
    assert {r.node: r.kind for r in report.remarks} == {"first": "missed", "second": "applied"}
    old, *new = (second_bias(m) for m in (before, analytic, measured))
    shifts = [n - old for n in new]
    assert np.abs(shifts[1]).max() > 0.01 and np.abs(shifts[0] - shifts[1]).max() < 0.03 * np.abs(shifts[1]).max()


def second_bias(model: Model) -> NDArray[np.float64]:
    (found,) = [const_array(n.inputs[2]) for n in model.graph if n.name == "second"]
    return np.asarray(found, np.float64)


# ---- refusals -------------------------------------------------------------------------------------------------------


def bare() -> Model:
    """A MatMul without a bias behind another."""
    rng = np.random.default_rng(0)
    held = {n: rng.standard_normal((SIDE, SIDE)).astype(np.float32) for n in ("w1", "w2")}
    nodes = [
        node("MatMul", ["x", "w1"], ["m"], name="first"),
        node("Relu", ["m"], ["r"], name="relu"),
        node("MatMul", ["r", "w2"], ["y"], name="second"),
    ]
    return built(nodes, ["N", 3, SIDE, SIDE], held)


@pytest.mark.parametrize(
    ("mode", "model", "words"),
    [
        ("empirical", bare(), "no constant bias"),
        ("sequential", bare(), "no constant bias"),
        ("bn", bare(), "no constant bias"),
        ("bn", deep(), "no BatchNormalization says what its input is like"),
    ],
)
def test_refusals_leave_the_model_alone(mode: str, model: Model, words: str) -> None:
    ctx = context("trt", quantize=(*LAYERS, "second"))
    before, _ = run_passes(model, registry.parse("canonicalize,opset,annotate,rtn"), arrays(), ctx)
    after, (report,) = run_passes(before, registry.parse(f"bias-correct{{mode={mode}}}"), arrays(), ctx)
    assert after.digest() == before.digest() and not report.modified
    assert {r.kind for r in report.remarks} == {"missed"} and all(words in r.reason and r.node for r in report.remarks)


def test_a_number_behind_a_product_is_no_bias() -> None:
    rng = np.random.default_rng(0)
    nodes = [node("MatMul", ["x", "w"], ["a"], name="mel"), node("Add", ["a", "tiny"], ["y"], name="floor")]
    model = built(nodes, ["N", 5, 8], {"w": rng.standard_normal((8, 8)).astype(np.float32), "tiny": np.float32(1e-6)})
    _, reports = run_passes(
        model,
        registry.parse("canonicalize,annotate,rtn,bias-correct"),
        {"x": rng.standard_normal((9, 5, 8)).astype(np.float32)},
        context(),
    )
    assert [r.reason for r in reports[-1].remarks] == ["the layer has no constant bias to correct"]
