"""The float rest in 16 bits: what stays in float32, why, and that nothing else does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import helper

from qcompile.ir.model import Model
from qcompile.ir.ops import const_array, is_op
from qcompile.pipeline import registry
from qcompile.report import PassReport
from tests.passes.lower.half_models import MODELS, digits, naive_half, overflowing_vit, strict
from tests.passes.measures import op_types, outputs, relative_error
from tests.passes.models import Feeds, built
from tests.passes.running import context, pipeline, run_passes

node = helper.make_node
T = onnx.TensorProto
RNG = np.random.default_rng(0)


def lowered(model: Model, arrays: Feeds, spec: str = "fp16") -> tuple[Model, PassReport]:
    done, reports = run_passes(model, registry.parse(f"canonicalize,{spec}"), arrays, context("trt", spec))
    return done, reports[-1]


GAP = "a Cast on each side"


def kept(report: PassReport) -> dict[str, str]:
    """Node -> reason, cheap nodes between islands aside."""
    return {r.node: r.reason for r in report.remarks if r.kind == "missed" and GAP not in r.reason}


def floats(model: Model) -> set[str]:
    """Nodes that compute in float32."""
    return {str(n.name) for n in model.graph if n.op_type != "Cast" and n.outputs[0].dtype == ir.DataType.FLOAT}


def tiny(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, Any] | None = None,
    shape: Sequence[Any] = ("N", 5, 16),
    opset: int = 17,
) -> Model:
    return built(nodes, shape, {n: np.asarray(v, np.float32) for n, v in (constants or {}).items()}, opset)


def normal(*shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


# the overflowing ViT


@pytest.mark.parametrize("scale", [256.0, 65536.0])
def test_a_vit_whose_norms_overflow_survives(scale: float) -> None:
    model, pictures = overflowing_vit(scale), digits("eval")
    reference = outputs(model, pictures)
    source = Model.load(MODELS / "vit_digits.onnx")
    assert relative_error(outputs(source, pictures), reference) <= 5e-6, "the function is the same in float32"
    naive = outputs(strict(naive_half(model)), pictures)[0]
    assert not np.isfinite(naive).all() or relative_error(reference, [naive]) > 0.9, "an infinite variance makes all tokens zero"

    ctx = context("trt", "fp16")
    fused, _ = pipeline("", model, digits("calib"), ctx)
    islands, _ = run_passes(model, registry.parse("canonicalize,fp16"), digits("calib"), ctx)
    for done in (fused, islands):
        got = outputs(strict(done), pictures)
        assert np.isfinite(got[0]).all() and relative_error(reference, got) < 2e-3
        assert relative_error(reference, outputs(done, pictures)) < 2e-3


def test_the_naive_conversion_makes_infinities_inside() -> None:
    model = naive_half(overflowing_vit(256.0))
    square = next(n for n in model.graph if n.op_type == "Pow").outputs[0]
    model.graph.outputs.clear()
    model.graph.outputs.append(square)
    assert np.isinf(outputs(strict(model), digits("eval"))[0]).any()


def test_without_fuse_norm_only_the_variance_stays() -> None:
    done, report = lowered(overflowing_vit(256.0), digits("calib"))
    variance = [n for n, why in kept(report).items() if "variance" in why]
    assert len(variance) == 13 * 4 and all(any(op in n for op in ("Pow", "ReduceMean", "Add", "Sqrt")) for n in variance)
    assert not any(n.op_type in ("MatMul", "Softmax", "Div", "Erf", "Conv") for n in done.graph if n.name in floats(done))


# one rule, one tiny model


def test_an_overflowing_tensor_stays_with_what_touches_it() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="big"),
        node("Relu", ["h"], ["r"], name="relu"),
        node("Transpose", ["r"], ["t"], name="move", perm=[0, 2, 1]),
        node("Mul", ["t", "small"], ["s"], name="shrink"),
        node("Tanh", ["s"], ["y"], name="tanh"),
    ]
    model = tiny(nodes, {"w": normal(16, 16, scale=1e4), "small": 1e-5})
    done, report = lowered(model, {"x": normal(8, 5, 16)})
    assert set(kept(report)) == {"big", "relu", "move", "shrink"}, "also where the tensor is only copied on"
    assert "reaches" in kept(report)["big"] and "16376" in kept(report)["big"]
    x = {"x": normal(4, 5, 16)}
    assert relative_error(outputs(model, x), outputs(strict(done), x)) < 5e-3


def test_reductions_stay_when_their_sum_overflows() -> None:
    nodes = [node("ReduceMean", ["x"], ["y"], name="mean", axes=[1])]
    model = tiny(nodes, shape=["N", 4096, 4])
    x = {"x": np.abs(normal(4, 4096, 4, scale=20))}
    done, report = lowered(model, x)
    assert "adds up 4096 terms" in kept(report)["mean"] and relative_error(outputs(model, x), outputs(strict(done), x)) < 1e-3
    assert not kept(lowered(model, {"x": x["x"] * 1e-2})[1]), "small terms may be added in float16"


@pytest.mark.parametrize("op_type", ["ReduceL2", "ReduceSumSquare"])
def test_reductions_that_square_stay(op_type: str) -> None:
    model = tiny([node(op_type, ["x"], ["h"], name="norm", axes=[-1]), node("Div", ["x", "h"], ["y"], name="divide")])
    assert "squares" in kept(lowered(model, {"x": normal(8, 5, 16)})[1])["norm"]


def test_an_epsilon_that_vanishes_keeps_the_quotient() -> None:
    """x / sqrt(sum |x| + 1e-12) of a row of zeros is 0, not 0 / 0."""
    nodes = [
        node("Abs", ["x"], ["a"], name="abs"),
        node("ReduceSum", ["a", "axis"], ["t"], name="total"),
        node("Add", ["t", "eps"], ["e"], name="guard"),
        node("Sqrt", ["e"], ["r"], name="root"),
        node("Div", ["x", "r"], ["q"], name="divide"),
        node("Tanh", ["q"], ["y"], name="tanh"),
    ]
    model = built(nodes, ["N", 5, 16], {"axis": np.array([-1]), "eps": np.float32(1e-12)})
    x = {"x": normal(8, 5, 16)}
    x["x"][:, 0] = 0
    done, report = lowered(model, x)
    assert {"guard", "root", "divide"} <= set(kept(report)) and "tanh" not in kept(report)
    assert np.isfinite(outputs(strict(done), x)[0]).all()


def test_small_divisors_stay() -> None:
    nodes = [
        node("Exp", ["x"], ["e"], name="exp"),
        node("ReduceSum", ["e", "axis"], ["t"], name="total"),
        node("Div", ["e", "t"], ["y"], name="divide"),
    ]
    model = built(nodes, ["N", 5, 16], {"axis": np.array([-1])})
    x = {"x": normal(8, 5, 16) - 15}
    done, report = lowered(model, x)
    assert {"total", "divide"} <= set(kept(report)) and "is divided by" in kept(report)["divide"]
    assert relative_error(outputs(model, x), outputs(strict(done), x)) < 2e-2
    assert not kept(lowered(model, {"x": x["x"] + 15})[1])


def test_constants_that_overflow_or_vanish_stay() -> None:
    nodes = [
        node("Mul", ["x", "tiny"], ["a"], name="down"),
        node("Mul", ["a", "huge"], ["b"], name="up"),
        node("Clip", ["b", "low", "high"], ["y"], name="clip"),
    ]
    model = tiny(nodes, {"tiny": 1e-9, "huge": 1e9, "low": -1e6, "high": 1e6})
    x = {"x": normal(8, 5, 16)}
    done, report = lowered(model, x)
    assert "vanishes" in kept(report)["down"] and "overflows" in kept(report)["up"] and "clip" not in kept(report)
    assert relative_error(outputs(model, x), outputs(strict(done), x)) < 2e-3


def test_angles_are_computed_where_they_are_exact() -> None:
    nodes = [
        node("Mul", ["x", "freq"], ["a"], name="angle"),
        node("Sin", ["a"], ["s"], name="sine"),
        node("MatMul", ["s", "w"], ["y"], name="fc"),
    ]
    model = tiny(nodes, {"freq": np.linspace(0.1, 1, 16), "w": normal(16, 16)})
    x = {"x": RNG.uniform(0, 1000, (8, 5, 16)).astype(np.float32).round()}
    done, report = lowered(model, x)
    assert set(kept(report)) == {"angle", "sine"} and relative_error(outputs(model, x), outputs(strict(done), x)) < 2e-3


def test_integers_that_are_not_exact_stay() -> None:
    nodes = [
        node("Cast", ["x"], ["i"], name="to_int", to=T.INT64),
        node("Cast", ["i"], ["f"], name="to_float", to=T.FLOAT),
        node("Sub", ["f", "middle"], ["y"], name="shift"),
    ]
    model = tiny(nodes, {"middle": 4000.0})
    x = {"x": RNG.integers(3990, 4010, (8, 5, 16)).astype(np.float32)}
    done, report = lowered(model, x)
    assert {"to_float", "shift"} <= set(kept(report)) and relative_error(outputs(model, x), outputs(strict(done), x)) == 0


def test_a_relu6_that_hides_large_terms_keeps_its_layer() -> None:
    nodes = [
        node("Conv", ["x", "w"], ["h"], name="conv"),
        node("Clip", ["h", "zero", "six"], ["y"], name="relu6"),
    ]
    weight = normal(8, 4, 1, 1)
    loud = tiny(nodes, {"w": weight * 100, "zero": 0, "six": 6}, ["N", 4, 8, 8])
    x = {"x": normal(8, 4, 8, 8)}
    assert "cut at 6" in kept(lowered(loud, x)[1])["conv"]
    assert not kept(lowered(tiny(nodes, {"w": weight, "zero": 0, "six": 6}, ["N", 4, 8, 8]), x)[1])


# masks


def masked(value: float) -> Model:
    """Scores of x plus (1 - keep) * value, twice, through a softmax."""
    nodes = [
        node("MatMul", ["x", "w"], ["s"], name="scores"),
        node("Slice", ["x", "zero", "one", "axis"], ["first"], name="first"),
        node("Greater", ["first", "level"], ["b"], name="hidden"),
        node("Cast", ["b"], ["m"], name="as_float", to=T.FLOAT),
        node("Mul", ["m", "value"], ["v"], name="mask"),
        node("Add", ["s", "v"], ["a"], name="masked"),
        node("Add", ["a", "v"], ["a2"], name="masked_again"),
        node("Softmax", ["a2"], ["y"], name="softmax", axis=1),
    ]
    constants = {"w": normal(16, 16), "level": np.float32(0.3), "value": np.float32(value)}
    constants |= {n: np.array([v]) for n, v in (("zero", 0), ("one", 1), ("axis", 2))}
    return built(nodes, ["N", 5, 16], constants)


@pytest.mark.parametrize("value", [-1e4, -65504.0, -3.4e38])
@pytest.mark.parametrize("spec", ["fp16", "bf16"])
def test_masks_do_not_tear_the_attention_apart(spec: str, value: float) -> None:
    model, x = masked(value), {"x": normal(8, 5, 16)}
    x["x"][:, 0, 0], x["x"][0, :, 0] = 0.0, 1.0  # the last assignment: a sample of nothing but masked tokens
    done, report = lowered(model, x, spec)
    assert not kept(report)
    got = outputs(strict(done), x)
    assert np.isfinite(got[0]).all()
    assert relative_error([outputs(model, x)[0][1:]], [got[0][1:]]) < (5e-3 if spec == "fp16" else 5e-2)


def test_a_large_constant_elsewhere_is_no_mask() -> None:
    model = tiny([node("Mul", ["x", "big"], ["h"], name="scale"), node("Tanh", ["h"], ["y"], name="tanh")], {"big": -1e6})
    assert "overflows" in kept(lowered(model, {"x": normal(4, 5, 16)})[1])["scale"]


def test_infinities_stay_infinite() -> None:
    nodes = [
        node("Greater", ["x", "level"], ["b"], name="test"),
        node("Where", ["b", "x", "inf"], ["h"], name="where"),
        node("Exp", ["h"], ["y"], name="exp"),
    ]
    model = tiny(nodes, {"level": 0.0, "inf": -np.inf})
    done, _ = run_passes(model, registry.parse("canonicalize"), {"x": normal(4, 5, 16)}, context("trt", "bf16"))
    done, _ = run_passes(done, registry.parse("bf16"), {"x": normal(4, 5, 16)}, context("trt", "bf16"))
    assert (outputs(strict(done), {"x": normal(4, 5, 16)})[0] == 0).any()


# where the precisions meet


def test_one_cast_a_tensor_and_no_gaps_between_islands() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="big"),
        node("Mul", ["h", "small"], ["s"], name="shrink"),
        node("Neg", ["s"], ["n"], name="gap"),
        node("Mul", ["n", "large"], ["g"], name="grow"),
        node("Mul", ["g", "small"], ["e"], name="end"),
        node("MatMul", ["e", "w1"], ["t1"], name="a"),
        node("MatMul", ["e", "w2"], ["t2"], name="b"),
        node("Add", ["t1", "t2"], ["y"], name="add"),
    ]
    model = tiny(nodes, {"w": normal(16, 16, scale=3e4), "small": 1e-6, "large": 3e6, "w1": normal(16, 16), "w2": normal(16, 16)})
    x = {"x": normal(8, 5, 16)}
    done, report = lowered(model, x)
    assert {r.node for r in report.remarks if GAP in r.reason} == {"gap"} and set(kept(report)) == {
        "big",
        "shrink",
        "grow",
        "end",
    }
    assert op_types(done).count("Cast") == 2, "one into the body, one out of it: the island starts at the input"
    assert relative_error(outputs(model, x), outputs(strict(done), x)) < 5e-3


@pytest.mark.parametrize(("size", "word"), [(1e-6, "vanishes in float16"), (1e9, "beyond float16")])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_a_site_whose_scale_float16_cannot_hold_stays_float(scheme: str, size: float, word: str) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["m"], name="fc"),
        node("Mul", ["m", "back"], ["n"], name="scaled"),
        node("Tanh", ["n"], ["h"], name="tanh"),
        node("MatMul", ["h", "v"], ["k"], name="other"),
        node("Relu", ["k"], ["r"], name="relu"),
        node("MatMul", ["r", "u"], ["y"], name="head"),
    ]
    numbers = {"w": normal(128, 64, scale=size), "v": normal(64, 128), "u": normal(128, 128), "back": 0.1 / size}
    model = tiny(nodes, numbers, ("N", 5, 128), opset=21)
    x = {"x": normal(8, 5, 128)}
    done, reports = pipeline("" if scheme == "w4a16" else "smooth", model, x, context("trt", scheme))
    told = [r.reason for report in reports for r in report.remarks if r.kind == "missed" and r.node == "fc"]
    scales = [const_array(n.inputs[1]) for n in done.graph if is_op(n, "QuantizeLinear", "DequantizeLinear")]
    assert any(word in reason and reason.endswith("kept in float") for reason in told)
    assert scales and all(s is not None and np.isfinite(s).all() and (s > 0).all() for s in scales), (
        "the other layer is quantized"
    )
    assert relative_error(outputs(model, x), outputs(strict(done), x)) < 0.3


def test_activations_beyond_float16_stay_float() -> None:
    """The power of a spectrum, say."""
    model = tiny(
        [
            node("MatMul", ["x", "w"], ["m"], name="fc"),
            node("Log", ["m"], ["h"], name="log"),
            node("MatMul", ["h", "v"], ["y"], name="out"),
        ],
        {"w": np.abs(normal(64, 64)), "v": normal(64, 64)},
        ("N", 5, 64),
        opset=19,
    )
    x = {"x": np.abs(normal(8, 5, 64, scale=1e8)) + 1}
    done, reports = pipeline("smooth", model, x, context("trt", "w8a8"))
    told = {r.node: r.reason for r in reports[-1].remarks if r.kind == "missed"} | kept(reports[-1])
    assert "fc" in told and np.isfinite(outputs(strict(done), x)[0]).all()
    assert relative_error(outputs(model, x), outputs(strict(done), x)) < 0.05


def test_scales_have_the_type_of_the_body() -> None:
    model = tiny([node("MatMul", ["x", "w"], ["y"], name="fc")], {"w": normal(16, 16)})
    for scheme, passes, dtype in (("w8a8", "smooth", "FLOAT16"), ("w8a8", "smooth,bf16", "BFLOAT16")):
        ctx = context("trt", scheme)
        if "bf16" in passes:
            ctx.scheme = replace(ctx.scheme, body="bfloat16")
        done, _ = pipeline(passes, model, {"x": normal(8, 5, 16)}, ctx)
        scales = [n.inputs[1] for n in done.graph if is_op(n, "QuantizeLinear", "DequantizeLinear")]
        assert scales and all(s is not None and s.dtype == ir.DataType[dtype] for s in scales)
        x = {"x": normal(4, 5, 16)}
        assert relative_error(outputs(model, x), outputs(strict(done), x)) < 0.1
