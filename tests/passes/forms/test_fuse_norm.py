"""Decomposed norms become one operator, or are left with a reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from qcompile.ir.model import Model
from qcompile.pipeline import registry
from qcompile.pipeline.base import PassContext
from qcompile.pipeline.planner import complete
from qcompile.quant.spec import SCHEMES
from qcompile.report import PassReport
from qcompile.target.catalog import TARGETS
from tests.passes.measures import op_types, outputs, relative_error
from tests.passes.models import Feeds, built, fixture, fixture_arrays
from tests.passes.running import context, run_passes

C = 16
LAYER = (
    ("ReduceMean", "x", "m"),
    ("Sub", "x m", "d"),
    ("Pow", "d two", "p"),
    ("ReduceMean", "p", "v"),
    ("Add", "v eps", "e"),
    ("Sqrt", "e", "r"),
    ("Div", "d r", "n"),
    ("Mul", "n g", "s"),
    ("Add", "s b", "y"),
)
RMS = (*LAYER[2:6], ("Div", "d r", "n"), ("Mul", "n g", "y"))


def constants() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    g, b = (rng.standard_normal(C).astype(np.float32) for _ in range(2))
    scalars = {"two": 2.0, "eps": 1e-5, "one": 1.0, "low": 1e-5, "high": 1e9}
    return {"g": g, "b": b, "wide": g.reshape(1, 1, C)} | {n: np.asarray(v, np.float32) for n, v in scalars.items()}


def nodes(rows: Sequence[tuple[str, str, str]], axis: int = -1) -> list[onnx.NodeProto]:
    made = []
    for i, (op, ins, out) in enumerate(rows):
        attributes: dict[str, Any] = (
            {"axes": [axis]} if op == "ReduceMean" else {"to": onnx.TensorProto.FLOAT} if op == "Cast" else {}
        )
        made.append(helper.make_node(op, ins.split(), [out], name=f"n{i}_{op}", **attributes))
    return made


def swapped(rows: Sequence[tuple[str, str, str]], **changes: tuple[tuple[str, str, str], ...]) -> list[tuple[str, str, str]]:
    """`rows` with the one that makes each named value replaced."""
    return [new for row in rows for new in changes.get(row[2], (row,))]


def fused(
    rows: Sequence[tuple[str, str, str]], axis: int = -1, opset: int = 17, outs: Sequence[str] = ("y",)
) -> tuple[Model, Model, PassReport]:
    source = built(nodes(rows, axis), ["N", 5, C], constants(), opset, outs)
    model, reports = run_passes(source, registry.parse("canonicalize,fuse-norm"), arrays(), context("trt", "fp16"))
    return source, model, reports[-1]


def arrays() -> Feeds:
    return {"x": np.random.default_rng(1).standard_normal((4, 5, C)).astype(np.float32) * 3 + 1}


FORMS = {
    "plain": LAYER,
    "mul-square": swapped(LAYER, p=(("Mul", "d d", "p"),)),
    "reciprocal": swapped(LAYER, n=(("Reciprocal", "r", "q"), ("Mul", "d q", "n"))),
    "one-over": swapped(LAYER, n=(("Div", "one r", "q"), ("Mul", "q d", "n"))),
    "twice-centred": swapped(LAYER, n=(("Sub", "x m", "d2"), ("Div", "d2 r", "n"))),
    "affine-first": swapped(LAYER, s=(("Mul", "g n", "s"),), y=(("Add", "b s", "y"),)),
    "wide-gamma": swapped(LAYER, s=(("Mul", "n wide", "s"),)),
    "one-constant-for-both": swapped(LAYER, y=(("Add", "s g", "y"),)),
    "no-beta": swapped(LAYER, s=(("Mul", "n g", "y"),), y=()),
    "no-affine": swapped(LAYER, n=(("Div", "d r", "y"),), s=(), y=()),
    "no-epsilon": swapped(LAYER, e=(), r=(("Sqrt", "v", "r"),)),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_exporters(form: str) -> None:
    source, model, report = fused(FORMS[form])
    assert op_types(model) == ["LayerNormalization"] and report.modified
    assert relative_error(outputs(source, arrays()), outputs(model, arrays())) <= 5e-6
    gamma = model.graph.node(0).inputs[1]
    assert gamma is not None and gamma.shape is not None and list(gamma.shape) == [C]


def test_two_norms_may_share_their_constants() -> None:
    second = [
        (op, " ".join("y" if v == "x" else v if v in constants() else f"{v}2" for v in ins.split()), f"{out}2")
        for op, ins, out in LAYER
    ]
    source, model, _ = fused([*LAYER, *second], outs=["y2"])
    assert op_types(model) == ["LayerNormalization"] * 2
    assert relative_error(outputs(source, arrays()), outputs(model, arrays())) <= 5e-6


def test_rms_norm_needs_opset_23() -> None:
    rows = swapped(RMS, p=(("Pow", "x two", "p"),), n=(("Div", "x r", "n"),))
    source = built(nodes(rows), ["N", 5, C], constants(), 17)
    old, reports = run_passes(source, registry.parse("canonicalize,fuse-norm"), arrays(), context())
    assert old.digest() and "put opset{version=23} in front" in reports[-1].remarks[0].reason
    new, _ = run_passes(source, registry.parse("canonicalize,opset{version=23},fuse-norm"), arrays(), context())
    assert op_types(new) == ["RMSNormalization"]
    assert relative_error(outputs(source, arrays()), outputs(new, arrays())) <= 5e-6


REFUSED = {
    "an inner value is an output": (LAYER, -1, 17, ["y", "v"], "its inner value v is read elsewhere"),
    "an inner value has another reader": (
        [*LAYER, ("Relu", "r", "z")],
        -1,
        17,
        ["y", "z"],
        "its inner value r is read elsewhere",
    ),
    "another axis": (LAYER, 1, 17, ["y"], "normalises over another axis"),
    "the variance is clipped": (swapped(LAYER, e=(("Max", "v eps", "e"),)), -1, 17, ["y"], "it clips the variance"),
    "the opset is too old": (LAYER, -1, 14, ["y"], "put opset{version=17} in front"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_left_alone_says_why(why: str) -> None:
    rows, axis, opset, outs, reason = REFUSED[why]
    _, model, report = fused(rows, axis, opset, outs)
    assert not report.modified and "Sqrt" in op_types(model)
    assert any(reason in r.reason for r in report.remarks)


def test_the_output_keeps_its_name() -> None:
    source = built(
        [*nodes(swapped(LAYER, y=(("Add", "s b", "h"),))), helper.make_node("Relu", ["h"], ["y"], name="act")],
        ["N", 5, C],
        constants(),
    )
    model, _ = run_passes(source, registry.parse("canonicalize,fuse-norm"), arrays(), context())
    assert model.graph.node(0).outputs[0].name == "h"


def test_casts_around_a_chain_in_a_half_model_are_what_the_operator_does() -> None:
    """x half -> Cast -> chain in float32 -> Cast -> gamma, beta half (Hugging Face T5, Llama)."""
    rows = [("Cast", "h", "x"), *swapped(LAYER, s=(("Cast16", "n", "n16"), ("Mul", "n16 g16", "s")), y=(("Add", "s b16", "y"),))]
    made = nodes([r for r in rows if r[0] != "Cast16"])
    made.insert(8, helper.make_node("Cast", ["n"], ["n16"], name="down", to=onnx.TensorProto.FLOAT16))
    half = {f"{n}16": constants()[n].astype(np.float16) for n in "gb"}
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT16, ["N", 5, C]) for n in "hy"]
    used = {n: constants()[n] for n in ("two", "eps")} | half
    weights = [onnx.numpy_helper.from_array(v, n) for n, v in used.items()]
    graph = helper.make_graph(made, "g", ends[:1], ends[1:], weights)
    source = Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))
    feeds = {"h": arrays()["x"].astype(np.float16)}
    model, _ = run_passes(source, registry.parse("fuse-norm"), feeds, context())
    assert op_types(model) == ["LayerNormalization"] and model.graph.outputs[0].dtype == ir.DataType.FLOAT16
    assert relative_error(outputs(source, feeds), outputs(model, feeds)) <= 1e-3


def test_an_old_model_is_raised_where_the_rest_becomes_half() -> None:
    for scheme in ("fp16", "bf16", "w8a8"):
        plan = complete([], TARGETS["trt"], SCHEMES[scheme])
        names = [p.name for p in plan.passes]
        assert names.index("opset") < names.index("fuse-norm")
    ctx = PassContext(SCHEMES["fp16"], TARGETS["trt"])
    passes = complete([], ctx.target, ctx.scheme).passes
    model, _ = run_passes(fixture("timm_vit_ts14"), passes, fixture_arrays("timm_vit_ts14"), ctx)
    assert model.opset == 17 and op_types(model).count("LayerNormalization") == 5


def test_onnx_runtime_targets_keep_their_chains() -> None:
    """ONNX Runtime fuses them itself, and nothing overflows in float32."""
    assert "fuse-norm" not in [p.name for p in complete([], TARGETS["ort"], SCHEMES["w8a8"]).passes]
