"""BatchNormalization in front of and behind every layer that can take it, and the forms that cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from qcompile.ir.model import Model
from qcompile.ir.notes import channel_stats
from qcompile.pipeline import registry
from qcompile.pipeline.runner import Runner, drive
from tests.passes.measures import double_outputs, op_types, outputs, relative_error, to_double
from tests.passes.models import built
from tests.passes.running import context, run_passes

node = helper.make_node
C, OUT = 8, 12
PICTURE: tuple[Any, ...] = ("N", C, 7, 7)
TOKENS: tuple[Any, ...] = ("N", 5, C)


def arrays(shape: tuple[Any, ...], seed: int = 0) -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(seed).standard_normal((3, *shape[1:])).astype(np.float32)}


def bn(x: str, y: str, **attributes: Any) -> onnx.NodeProto:
    return node("BatchNormalization", [x, "gamma", "beta", "mu", "v"], [y], name="bn", **attributes)


def weights(channels: int, **shapes: tuple[int, ...]) -> dict[str, Any]:
    """Normalization parameters of `channels`, and other weights."""
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {n: rng.standard_normal(channels).astype(np.float32) for n in ("gamma", "beta", "mu")}
    made["v"] = rng.uniform(0.5, 2, channels).astype(np.float32)
    return made | {n: (rng.standard_normal(s) * 0.5).astype(np.float32) for n, s in shapes.items()}


def conv_first(groups: int, transposed: bool, bias: bool) -> Model:
    shape = (C, OUT // groups, 3, 3) if transposed else (OUT, C // groups, 3, 3)
    op, inputs = "ConvTranspose" if transposed else "Conv", ["x", "w", *(["c"] if bias else [])]
    nodes = [node(op, inputs, ["z"], name="layer", group=groups, pads=[1, 1, 1, 1]), bn("z", "y")]
    return built(nodes, PICTURE, weights(OUT, w=shape, **({"c": (OUT,)} if bias else {})))


def linear_first(form: str) -> tuple[Model, tuple[Any, ...]]:
    held = weights(OUT, w=(OUT, C) if form == "gemm-t" else (C, OUT), c=(OUT,))
    if form.startswith("gemm"):
        nodes = [node("Gemm", ["x", "w", "c"], ["z"], name="layer", transB=int(form == "gemm-t")), bn("z", "y")]
        return built(nodes, ["N", C], held), ("N", C)
    product = [node("MatMul", ["x", "w"], ["m"], name="layer"), node("Add", ["m", "c"], ["z"], name="layer_bias")]
    if form == "matmul":
        return built([*product, bn("z", "y")], ["N", C], held), ("N", C)
    if form == "no-bias":
        del held["c"]
        return built([product[0], bn("m", "y")], ["N", C], held), ("N", C)
    if form == "transposed":
        moves = [node("Transpose", ["z"], ["t"], name="to_channels", perm=[0, 2, 1]), bn("t", "n")]
        moves.append(node("Transpose", ["n"], ["y"], name="to_tokens", perm=[0, 2, 1]))
    else:
        held |= {"flat": np.array([-1, OUT]), "back": np.array([-1, 5, OUT])}
        moves = [node("Reshape", ["z", "flat"], ["t"], name="flatten"), bn("t", "n")]
        moves.append(node("Reshape", ["n", "back"], ["y"], name="unflatten"))
    return built([*product, *moves], TOKENS, held), TOKENS


def behind(form: str, pads: int = 0, shift: bool = True) -> Model:
    """Relu -> BatchNormalization -> layers."""
    held = weights(C, w=(OUT, C, 3, 3), c=(OUT,), d=(C, 1, 3, 3), g=(C * 49, OUT), b=(OUT,))
    if not shift:
        held |= {"beta": np.zeros(C, np.float32), "mu": np.zeros(C, np.float32)}
    conv = node("Conv", ["n", "w", "c"], ["y"], name="conv", pads=[pads] * 4)
    ends = {
        "conv": [conv],
        "depthwise": [node("Conv", ["n", "d"], ["y"], name="depthwise", group=C)],
        "gemm": [node("Flatten", ["n"], ["f"], name="flat"), node("Gemm", ["f", "g", "b"], ["y"], name="gemm")],
        "two": [conv, node("Conv", ["n", "d"], ["y2"], name="depthwise", group=C)],
        "relu": [node("Relu", ["n"], ["y"], name="relu")],
        "transpose": [node("ConvTranspose", ["n", "g2"], ["y"], name="up")],
        "both": [conv, node("Relu", ["n"], ["y2"], name="relu")],
    }[form]
    held |= {"g2": np.ones((C, 2, 3, 3), np.float32)} if form == "transpose" else {}
    nodes = [node("Relu", ["x"], ["r"], name="front"), bn("r", "n"), *ends]
    read = {v for n in nodes for v in n.input}
    return built(
        nodes,
        PICTURE,
        {k: v for k, v in held.items() if k in read},
        outs=["y", "y2"] if len(ends) == 2 and form != "gemm" else ["y"],
    )


def folded(model: Model, shape: tuple[Any, ...] = PICTURE) -> tuple[Model, list[Any]]:
    after, reports = run_passes(model, registry.parse("canonicalize,fold-bn"), arrays(shape), context())
    return after, list(reports[-1].remarks)


def check_fold(model: Model, shape: tuple[Any, ...], remark: str, *, exactly: bool = True) -> Model:
    """The fold happens, is exact, and leaves no normalization."""
    after, remarks = folded(model, shape)
    assert [(r.kind, r.node, r.reason) for r in remarks] == [("applied", "bn", remark)]
    assert "BatchNormalization" not in op_types(after)
    assert relative_error(outputs(model, arrays(shape, 1)), outputs(after, arrays(shape, 1))) < 2e-6
    if not exactly:
        return after
    canonical, _ = drive(Runner(verify="off").steps(model, registry.parse("canonicalize"), context()))
    wide = to_double(canonical)
    exact, _ = drive(Runner(verify="off").steps(wide, registry.parse("fold-bn"), context()))
    assert relative_error(double_outputs(wide, arrays(shape, 1)), double_outputs(exact, arrays(shape, 1))) < 1e-12
    return after


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_convolutions_in_front(groups: int, transposed: bool, bias: bool) -> None:
    """(onnx's reference evaluator has no grouped ConvTranspose.)"""
    check_fold(conv_first(groups, transposed, bias), PICTURE, "folded into layer", exactly=groups == 1 or not transposed)


def test_a_depthwise_convolution_in_front() -> None:
    nodes = [node("Conv", ["x", "w"], ["z"], name="layer", group=C, pads=[1, 1, 1, 1]), bn("z", "y")]
    check_fold(built(nodes, PICTURE, weights(C, w=(C, 1, 3, 3))), PICTURE, "folded into layer")


@pytest.mark.parametrize("form", ["gemm", "gemm-t", "matmul", "no-bias", "transposed", "reshaped"])
def test_matrix_products_in_front(form: str) -> None:
    model, shape = linear_first(form)
    check_fold(model, shape, "folded into layer")


@pytest.mark.parametrize(
    ("form", "into"), [("conv", "conv"), ("depthwise", "depthwise"), ("gemm", "gemm"), ("two", "conv, depthwise")]
)
def test_layers_behind(form: str, into: str) -> None:
    check_fold(behind(form), PICTURE, f"folded into {into} behind it")


def test_a_scale_alone_goes_into_a_padded_convolution() -> None:
    check_fold(behind("conv", pads=1, shift=False), PICTURE, "folded into conv behind it")


def test_the_distribution_is_noted_for_later_passes() -> None:
    model = conv_first(1, False, True)
    after, _ = folded(model)
    stats = channel_stats(after.graph.outputs[0])
    assert stats is not None
    held = weights(OUT, w=(OUT, C, 3, 3), c=(OUT,))
    assert np.array_equal(stats.mean, held["beta"]) and np.array_equal(stats.std, np.abs(held["gamma"].astype(np.float64)))


def shared() -> Model:
    nodes = [node("Conv", ["x", "w"], ["z"], name="layer"), bn("z", "n"), node("Add", ["n", "z"], ["y"], name="sum")]
    return built(nodes, PICTURE, weights(OUT, w=(OUT, C, 3, 3)))


def training() -> Model:
    return built(
        [node("Conv", ["x", "w"], ["z"], name="layer"), bn("z", "y", training_mode=1)], PICTURE, weights(OUT, w=(OUT, C, 3, 3))
    )


def computed() -> Model:
    held = weights(C)
    nodes = [node("ReduceMean", ["x"], ["mu2"], name="mean", axes=[0, 2, 3], keepdims=0), bn("x", "y")]
    nodes[1].input[3] = "mu2"
    del held["mu"]
    return built(nodes, PICTURE, held)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (behind("conv", pads=1), "Conv conv behind it pads with zeros"),
        (behind("relu"), "Relu relu behind it is no layer"),
        (behind("both"), "Relu relu behind it is no layer"),
        (behind("transpose"), "ConvTranspose up behind it is no layer"),
        (shared(), "the output of layer has another reader"),
        (training(), "it is in training mode"),
        (computed(), "its parameters are not constant"),
    ],
    ids=["padded", "activation", "one of two", "transposed convolution", "other reader", "training", "computed"],
)
def test_refusals_name_the_reason_and_change_nothing(model: Model, words: str) -> None:
    before, _ = run_passes(model, registry.parse("canonicalize"), arrays(PICTURE), context())
    after, remarks = folded(model)
    assert after.digest() == before.digest()
    assert [(r.kind, r.node) for r in remarks] == [("missed", "bn")] and words in remarks[0].reason
