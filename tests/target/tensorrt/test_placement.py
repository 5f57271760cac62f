"""The TensorRT defaults: what stays in float and why, and that --quantize asks otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from onnx import helper

from qcompile.decide.decisions import decisions
from qcompile.decide.quantizer import Quantizer
from qcompile.ir.model import Model
from qcompile.pipeline import registry
from qcompile.report import PassReport
from tests.passes.models import block, built
from tests.passes.running import context, pipeline, prefix, run_passes

node = helper.make_node
Decisions = dict[tuple[str, int], Quantizer]


def random(*shape: int) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(shape) * 0.2).astype(np.float32)


def decided(
    model: Model, shape: Sequence[int], passes: str = "annotate", scheme: str = "w8a8", target: str = "rtx", **options: Any
) -> tuple[Decisions, PassReport]:
    """The decisions of annotate behind what it requires, and its report."""
    ctx = context(target, scheme, **options)
    (annotate,) = registry.parse(passes)
    after, reports = run_passes(model, [*prefix(annotate, ctx), annotate], {"x": random(*shape)}, ctx)
    return {(str(n.name), slot): d for n, slot, d in decisions(after.graph)}, reports[-1]


def reasons(report: PassReport, name: str) -> str:
    return " | ".join(r.reason for r in report.remarks if r.node == name and r.kind == "missed")


def convs(channels: int = 3, first: dict[str, Any] | None = None) -> Model:
    """x -> Conv first -> Relu -> Conv body -> Relu -> Conv last -> y."""
    attributes = {"pads": [1] * 4} | (first or {})
    groups = attributes.get("group", 1)
    constants = {"w0": random(16, channels // groups, 3, 3), "w1": random(16, 16, 3, 3), "w2": random(16, 16, 1, 1)}
    nodes = [
        node("Conv", ["x", "w0"], ["c0"], name="first", **attributes),
        node("Relu", ["c0"], ["r0"], name="relu0"),
        node("Conv", ["r0", "w1"], ["c1"], name="body", pads=[1] * 4),
        node("Relu", ["c1"], ["r1"], name="relu1"),
        node("Conv", ["r1", "w2"], ["y"], name="last"),
    ]
    return built(nodes, ["N", channels, 8, 8], constants)


def dense(widths: Sequence[int] = (32, 32, 32), tail: Sequence[Any] = ()) -> Model:
    """x -> MatMul -> Relu -> MatMul (-> tail) -> y."""
    constants: dict[str, Any] = {"w0": random(widths[0], widths[1]), "w1": random(widths[1], widths[2])}
    constants |= {"one": np.float32(1), "flat": np.array([-1, widths[2]])}
    nodes = [
        node("MatMul", ["x", "w0"], ["m0"], name="fc1"),
        node("Relu", ["m0"], ["r0"], name="relu"),
        node("MatMul", ["r0", "w1"], ["m1" if tail else "y"], name="fc2"),
        *tail,
    ]
    return built(nodes, ["N", 4, widths[0]], constants)


def transposed() -> Model:
    constants = {"w0": random(16, 16, 2, 2), "w1": random(16, 16, 1, 1), "w2": random(16, 16, 1, 1)}
    nodes = [
        node("Conv", ["x", "w1"], ["c"], name="body"),
        node("ConvTranspose", ["c", "w0"], ["u"], name="up", strides=[2, 2]),
        node("MaxPool", ["u"], ["p"], name="pool", kernel_shape=[2, 2]),
        node("Conv", ["p", "w2"], ["y"], name="last"),
    ]
    return built(nodes, ["N", 16, 8, 8], constants)


DEFAULTS: list[tuple[str, Callable[[], Model], tuple[int, ...], str, str, str]] = [
    ("int8 stem", convs, (4, 3, 8, 8), "w8a8", "first", "3 input channels are fewer than the 4"),
    ("fp8 stem", convs, (4, 3, 8, 8), "fp8", "first", "3 input channels are fewer than the 16"),
    ("fp8, 8 channels", lambda: convs(8), (4, 8, 8, 8), "fp8", "first", "8 input channels are fewer than the 16"),
    ("conv head", convs, (4, 3, 8, 8), "w8a8", "last", "a head"),
    ("narrow", lambda: dense((32, 8, 32)), (4, 4, 32), "w8a8", "fc1", "32x8 matrix is too small"),
    ("dense head", dense, (4, 4, 32), "w8a8", "fc2", "a head"),
    ("weight-only head", dense, (4, 4, 32), "w4a16", "fc2", "a head"),
    ("deconvolution", transposed, (4, 16, 8, 8), "w8a8", "up", "no low-precision deconvolution"),
]


@pytest.mark.parametrize(("name", "model", "shape", "scheme", "site", "reason"), DEFAULTS, ids=[d[0] for d in DEFAULTS])
def test_default_refusals_and_their_override(
    name: str, model: Callable[[], Model], shape: tuple[int, ...], scheme: str, site: str, reason: str
) -> None:
    found, report = decided(model(), shape, scheme=scheme)
    assert (site, 1) not in found and reason in reasons(report, site) and "--quantize" in reasons(report, site)
    found, report = decided(model(), shape, scheme=scheme, quantize=(site,))
    assert (site, 1) in found and not reasons(report, site)


@pytest.mark.parametrize(
    ("model", "shape", "scheme", "site"),
    [
        (lambda: convs(4), (4, 4, 8, 8), "w8a8", "first"),
        (lambda: convs(16), (4, 16, 8, 8), "fp8", "first"),
        (lambda: convs(16, {"group": 16}), (4, 16, 8, 8), "fp8", "first"),
        (convs, (4, 3, 8, 8), "w8a8", "body"),
        (lambda: dense((16, 16, 16)), (4, 4, 16), "w8a8", "fc1"),
    ],
    ids=["4 channels int8", "16 channels fp8", "depthwise", "body", "16x16"],
)
def test_what_the_default_quantizes(model: Callable[[], Model], shape: tuple[int, ...], scheme: str, site: str) -> None:
    found, _ = decided(model(), shape, scheme=scheme)
    assert {(site, 0), (site, 1)} <= found.keys()


@pytest.mark.parametrize("scheme", ["w6a6", "w4a4"])
def test_simulated_widths_study_every_layer(scheme: str) -> None:
    assert ("first", 1) in decided(convs(), (4, 3, 8, 8), scheme=scheme)[0]


TAILS = {
    "bias and softmax": [node("Add", ["m1", "one"], ["a"], name="bias"), node("Softmax", ["a"], ["y"], name="softmax")],
    "reshape": [node("Reshape", ["m1", "flat"], ["y"], name="flat")],
    "sigmoid, scaled": [node("Sigmoid", ["m1"], ["s"], name="s"), node("Mul", ["s", "one"], ["y"], name="times")],
}
BODIES = {
    "a residual stream": [node("Add", ["m1", "r0"], ["y"], name="sum")],
    "a norm": [node("LpNormalization", ["m1"], ["y"], name="norm")],
    "a mean": [node("ReduceMean", ["m1"], ["y"], name="mean")],
}


@pytest.mark.parametrize(("tail", "head"), [*((t, True) for t in TAILS.values()), *((t, False) for t in BODIES.values())])
def test_what_a_head_is(tail: Sequence[Any], head: bool) -> None:
    found, _ = decided(dense(tail=tail), (4, 4, 32))
    assert ("fc1", 1) in found and (("fc2", 1) not in found) == head


def test_a_model_of_heads_alone_is_quantized() -> None:
    model = built([node("MatMul", ["x", "w"], ["y"], name="fc")], ["N", 4, 32], {"w": random(32, 32)})
    assert ("fc", 1) in decided(model, (4, 4, 32))[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"keep_float": ("op:Conv",)}, set[str]()),
        ({"only": ("body",)}, {"body"}),
        ({"only": ("body",), "quantize": ("last",)}, {"body", "last"}),
        ({"keep_float": ("last",), "quantize": ("op:Conv",)}, {"first", "body"}),
        ({"keep_float": ("region:..relu1",), "quantize": ("re:^last$",)}, {"last"}),
        ({"only": ("region:relu0..relu1",)}, {"body"}),
    ],
)
def test_selectors_together(options: dict[str, tuple[str, ...]], expected: set[str]) -> None:
    found, _ = decided(convs(), (4, 3, 8, 8), **options)
    assert {name for name, slot in found if slot == 1} == expected


def test_a_selector_that_chooses_nothing_is_remarked() -> None:
    _, report = decided(convs(), (4, 3, 8, 8), quantize=("op:Gemm", "relu0", "body"))
    idle = [r.reason for r in report.remarks if "chooses no node" in r.reason]
    assert len(idle) == 2 and "op:Gemm" in idle[0] and "relu0" in idle[1]


def test_what_cannot_be_quantized_says_so_also_when_asked() -> None:
    constants = {"w0": random(32, 4), "w1": random(32, 32)}
    nodes = [
        node("MatMul", ["w0", "x"], ["m"], name="left"),
        node("MatMul", ["m", "w1"], ["y"], name="right"),
    ]
    _, report = decided(built(nodes, ["N", 4, 32], constants), (4, 4, 32), quantize=("left",))
    assert "--quantize left cannot be met" in reasons(report, "left")


# attention ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "option", "scale"),
    [
        ("w8a8", "auto", None),
        ("w8a8", "measured", None),
        ("w8a8", "fixed", 1 / 127),
        ("fp8", "auto", 1 / 448),
        ("fp8", "measured", None),
        ("fp8", "fixed", 1 / 448),
        ("w4a4", "fixed", None),
    ],
)
def test_the_range_of_the_probabilities(scheme: str, option: str, scale: float | None) -> None:
    found, _ = decided(block(), (4, 5, 16), f"annotate{{probabilities={option}}}", scheme)
    params = found["pv", 0].qparams
    assert params is not None and {("scores", 0), ("scores", 1), ("pv", 0), ("pv", 1)} <= found.keys()
    fixed = 1 / 448 if scheme == "fp8" else 1 / 127
    assert (float(params.scale) == pytest.approx(fixed, rel=1e-6)) == (scale is not None)
    assert not any(name == "softmax" for name, _ in found)


def test_attention_is_quantized_as_a_whole() -> None:
    found, report = decided(block(), (4, 5, 16), keep_float=("scores",))
    assert not any(name in ("scores", "pv") for name, _ in found) and "--keep-float" in reasons(report, "pv")
    found, _ = decided(block(), (4, 5, 16), "annotate{attention=none}", quantize=("pv",))
    assert {("scores", 0), ("scores", 1), ("pv", 0), ("pv", 1)} <= found.keys()


@pytest.mark.parametrize(
    ("scheme", "passes", "options", "quantized"),
    [
        ("w8a8", "annotate", {}, True),
        ("fp8", "annotate", {}, False),
        ("fp8", "annotate{attention=all}", {}, True),
        ("fp8", "annotate", {"quantize": ("op:MatMul",)}, True),
    ],
)
def test_fp8_attention_of_dynamic_length(scheme: str, passes: str, options: dict[str, Any], quantized: bool) -> None:
    found, report = decided(dynamic(), (4, 5, 16), passes, scheme, **options)
    assert (("pv", 0) in found) == quantized
    assert ("sequence length is dynamic" in reasons(report, "pv")) == (not quantized)


def dynamic() -> Model:
    """x [N, T, 16] -> q, k, v -> attention -> projection, T unknown."""
    constants = {n: random(16, 16) for n in ("wq", "wk", "wv", "wo", "w1")}
    nodes = [
        node("MatMul", ["x", "wq"], ["q"], name="q"),
        node("MatMul", ["x", "wk"], ["k"], name="k"),
        node("MatMul", ["x", "wv"], ["v"], name="v"),
        node("Transpose", ["k"], ["kt"], name="k_t", perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["s"], name="scores"),
        node("Softmax", ["s"], ["p"], name="softmax", axis=-1),
        node("MatMul", ["p", "v"], ["o"], name="pv"),
        node("MatMul", ["o", "wo"], ["y"], name="proj"),
    ]
    return built(nodes, ["N", "T", 16], constants)


# branches ----------------------------------------------------------------------------------------


def residual() -> Model:
    """x -> Conv stem -> Relu -> (Conv a -> Relu -> Conv b) + skip -> Conv last."""
    constants = {n: random(16, 16, 3, 3) for n in ("w0", "w1", "w2", "w3")}
    pads = {"pads": [1] * 4}
    nodes = [
        node("Conv", ["x", "w0"], ["c0"], name="stem", **pads),
        node("Relu", ["c0"], ["r0"], name="relu0"),
        node("Conv", ["r0", "w1"], ["c1"], name="a", **pads),
        node("Relu", ["c1"], ["r1"], name="relu1"),
        node("Conv", ["r1", "w2"], ["c2"], name="b", **pads),
        node("Add", ["c2", "r0"], ["s"], name="sum"),
        node("Conv", ["s", "w3"], ["y"], name="last", **pads),
    ]
    return built(nodes, ["N", 16, 8, 8], constants)


@pytest.mark.parametrize(
    ("passes", "options", "shared"),
    [
        ("annotate", {}, False),
        ("annotate{residual=shared}", {}, True),
        ("annotate", {"quantize": ("op:Add",)}, True),
        ("annotate{residual=shared}", {"keep_float": ("sum",)}, False),
        ("annotate{residual=shared}", {"target": "ort", "scheme": "w4a4"}, False),
    ],
)
def test_residual_adds(passes: str, options: dict[str, Any], shared: bool) -> None:
    found, report = decided(residual(), (4, 16, 8, 8), passes, **options)
    assert (("sum", 1) in found) == shared and ("sum", 0) not in found
    if shared:
        assert found["sum", 1] is found["a", 0]
        assert any("shares the quantizer of a" in r.reason for r in report.remarks)
    elif options.get("target") != "ort":
        assert reasons(report, "sum")


def test_a_shared_residual_has_one_quantizer_node() -> None:
    arrays = {"x": random(4, 16, 8, 8)}
    model, _ = pipeline("annotate{residual=shared}", residual(), arrays, context("rtx"))
    add = next(n for n in model.graph if n.name == "sum")
    skip, conv = add.inputs[1], next(n for n in model.graph if n.name == "a").inputs[0]
    assert skip is conv and skip is not None
    producer = skip.producer()
    assert producer is not None and producer.op_type == "DequantizeLinear"


def concatenated(gain: float) -> Model:
    """Conv a -> Relu -> {Conv b, Concat with b's output} -> Conv joined -> Conv last; `gain` says how large b is."""
    constants = {
        "w0": random(16, 16, 1, 1),
        "w1": np.float32(gain) * random(16, 16, 1, 1),
        "w2": random(16, 32, 1, 1),
        "w3": random(16, 16, 1, 1),
    }
    nodes = [
        node("Conv", ["x", "w0"], ["c0"], name="a"),
        node("Relu", ["c0"], ["r0"], name="relu0"),
        node("Conv", ["r0", "w1"], ["c1"], name="b"),
        node("Relu", ["c1"], ["r1"], name="relu1"),
        node("Concat", ["r0", "r1"], ["j"], name="join", axis=1),
        node("Conv", ["j", "w2"], ["c2"], name="joined"),
        node("Conv", ["c2", "w3"], ["y"], name="last"),
    ]
    return built(nodes, ["N", 16, 8, 8], constants)


@pytest.mark.parametrize(("gain", "scheme"), [(0.2, "w8a8"), (8, "fp8")])
def test_concatenated_tensors_share_a_scale(gain: float, scheme: str) -> None:
    found, report = decided(concatenated(gain), (4, 16, 8, 8), scheme=scheme)
    inner, outer = found["b", 0].qparams, found["joined", 0].qparams
    assert inner is not None and outer is not None and float(inner.scale) == float(outer.scale)
    assert any(r.node == "b" and "of j, so that one scale serves both" in str(r.numbers["range"]) for r in report.remarks)


def test_a_small_tensor_keeps_its_scale_in_front_of_a_concat() -> None:
    """Under the scale of a Concat eight times as wide it would have 16 codes of 127."""
    found, report = decided(concatenated(8), (4, 16, 8, 8))
    inner, outer = found["b", 0].qparams, found["joined", 0].qparams
    assert inner is not None and outer is not None and float(outer.scale) > 4 * float(inner.scale)
    assert any(r.node == "b" and "that of j is" in str(r.numbers.get("range")) for r in report.remarks)


def test_one_quantizer_for_each_tensor() -> None:
    found, _ = decided(block(), (4, 5, 16))
    model = block()
    names: dict[str, set[Quantizer]] = {}
    inputs = {str(n.name): n.inputs for n in model.graph}
    for (name, slot), quantizer in found.items():
        if name in inputs and (value := inputs[name][slot]) is not None:
            names.setdefault(str(value.name), set()).add(quantizer)
    assert all(len(found) == 1 for found in names.values())
