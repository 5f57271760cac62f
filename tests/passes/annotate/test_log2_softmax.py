"""Companded codes in the graph: equal to their reference, refused where no target runs them, exact where it is lowered."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import helper

from qcompile.decide.decisions import decide, decision, decisions
from qcompile.decide.quantizer import Quantizer
from qcompile.errors import UsageError
from qcompile.ir.edit import insert_after, redirect
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array
from qcompile.ir.text import print_model
from qcompile.pipeline import registry
from qcompile.quant.companding import codebook, companded_type, fit, twin_branches
from qcompile.quant.qtype import qtype
from qcompile.quant.spec import QParams, QuantSpec
from qcompile.report import PassReport
from qcompile.rewrite.companding import companded_activation
from qcompile.target.check import check
from tests.passes.measures import outputs, relative_error, sqnr_db
from tests.passes.models import Feeds, block, built
from tests.passes.running import context, pipeline, run_passes, step
from tools.transplant import transplant

MODELS = Path(__file__).parents[3] / "models"
KINDS = ("log2", "log-sqrt2", "sulq", "adalog", "tan", "twin", "uniform")
node = helper.make_node


@cache
def points() -> NDArray[np.float32]:
    rng = np.random.default_rng(1)
    spread = np.concatenate([rng.uniform(-0.2, 1, 50_000), 2.0 ** rng.uniform(-24, 0, 50_000), [0.0, 1.0]])
    return spread.astype(np.float32).reshape(-1, 2)


def arrays() -> Feeds:
    return {"x": np.random.default_rng(0).standard_normal((8, 5, 16)).astype(np.float32)}


def coded_by_graph(name: str, params: QParams, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The lowering of one quantizer, run by ONNX Runtime."""
    model = built([node("Identity", ["x"], ["h"], name="h"), node("Relu", ["h"], ["y"], name="end")], ["N", 2], {}, opset=19)
    value, end = model.graph.node(0).outputs[0], model.graph.node(1)
    chain = companded_activation(model.graph, value, Quantizer(QuantSpec(qtype(name))), params)
    insert_after(model.graph, value, *chain)
    redirect(end.outputs[0], chain[-1].outputs[0], [])
    model.graph.outputs[0] = chain[-1].outputs[0]
    return outputs(model, {"x": x})[0]


@pytest.mark.parametrize("kind", [*KINDS, "twin-gelu"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("paper", [False, True])
def test_the_graph_is_its_reference_bit_for_bit(kind: str, bits: int, paper: bool) -> None:
    x, coded = points(), companded_type(kind, bits, paper)
    params = fit(coded, np.abs(x[:2000]) if kind != "twin-gelu" else x[:2000], shift=0.1 if kind == "adalog" else 0.0)
    book = codebook(coded, params)
    ties = np.resize(np.concatenate([book.thresholds, np.nextafter(book.thresholds, np.float32(-1))]), (300, 2))
    feed = np.concatenate([x, ties.astype(np.float32)])
    assert np.array_equal(coded_by_graph(coded.name, params, feed), book.fake_quant(feed).astype(np.float32))


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("name", ["log2u4@float8e4m3fn", "log2u4p@float8e4m3fn", "log2u3@float8e4m3fn"])
def test_powers_of_two_go_through_fp8_unrounded(name: str, scale: float) -> None:
    """Log and Exp are within an ulp, so only numbers beside a tie may differ; FP8 rounds none of the others."""
    params, x = QParams(np.asarray(scale), np.zeros((), np.int64)), np.abs(points())
    got, book = coded_by_graph(name, params, x), codebook(qtype(name), params)
    away = np.abs(x[..., None] / book.thresholds - 1).min(-1) > 1e-5
    assert away.mean() > 0.999
    codes = (got / np.float32(scale * 2.0**-8)).astype(np.float32)
    assert np.allclose(got[away], book.fake_quant(x)[away], rtol=1e-6, atol=0)
    assert np.allclose(codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), codes, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_kind_on_attention(kind: str, bits: int) -> None:
    made, reports = pipeline(f"log2-softmax{{kind={kind} bits={bits}}}", block(), arrays(), context("ort"))
    plain, _ = pipeline("", block(), arrays(), context("ort"))
    assert said(reports, "log2-softmax") == [("applied", "softmax", f"probabilities in {kind}u{bits}")]
    reference = outputs(block(), arrays())[0]
    got, base = (sqnr_db(reference, outputs(m, arrays())[0]) for m in (made, plain))
    assert got > (base - 3 if bits == 8 and kind in ("sulq", "tan", "twin", "uniform", "adalog") else 18)


def said(reports: list[PassReport], name: str) -> list[tuple[str, str | None, str]]:
    return [(r.kind, r.node, r.reason) for x in reports for r in x.remarks if r.pass_name == name]


REFUSED = [
    ("log2-softmax{kind=adalog}", "trt", "w8a8", "softmax", "cannot express companded codes"),
    ("log2-softmax{deploy=fp8}", "ort", "w8a8", "softmax", "needs the scheme fp8"),
    ("log2-softmax{deploy=fp8}", "rtx", "w8a8", "softmax", "needs the scheme fp8"),
    ("compand-gelu", "trt", "w8a8", "fc2", "split-range"),
]


@pytest.mark.parametrize(("spec", "target", "scheme", "where", "why"), REFUSED)
def test_refusals_leave_the_model_alone(spec: str, target: str, scheme: str, where: str, why: str) -> None:
    done = step(registry.parse(spec)[0], block(), arrays(), context(target, scheme))
    assert not done.changed and not done.report.modified
    assert [(r.kind, r.node) for r in done.report.remarks] == [("missed", where)]
    assert why in done.report.remarks[0].reason


@pytest.mark.parametrize("spec", ["log2-softmax", "compand-gelu", "split-range{softmax}"])
def test_sites_that_the_user_keeps_in_float(spec: str) -> None:
    ctx = context("ort", keep_float=("pv", "fc2"))
    done = step(registry.parse(spec)[0], block(), arrays(), ctx)
    assert not done.changed and all("--keep-float" in r.reason for r in done.report.remarks)


def relu_block() -> Model:
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((16, 16)).astype(np.float32) for n in ("w1", "w2")}
    nodes = [
        node("MatMul", ["x", "w1"], ["a"], name="fc1"),
        node("Relu", ["a"], ["r"], name="relu"),
        node("MatMul", ["r", "w2"], ["y"], name="fc2"),
    ]
    return built(nodes, ["N", 5, 16], weights)


@pytest.mark.parametrize(
    ("spec", "why"), [("compand-gelu", "not a GELU"), ("compand-gelu{kind=twin}", "not a GELU"), ("split-range", "one sign")]
)
def test_relu_is_refused(spec: str, why: str) -> None:
    done = step(registry.parse(spec)[0], relu_block(), arrays(), context("ort"))
    assert not done.changed and [r.node for r in done.report.remarks] == ["fc2"] and why in done.report.remarks[0].reason


@pytest.mark.parametrize("options", ["deploy=fp8 kind=adalog", "deploy=fp8 bits=6", "bits=9", "bits=1"])
def test_options_that_make_no_sense(options: str) -> None:
    with pytest.raises(UsageError):
        registry.parse(f"log2-softmax{{{options}}}")


# ---- GELU -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4"])
def test_bias_reparameterization_is_exact(scheme: str) -> None:
    """(Q(x + d) - d) Wq + c == Q(x + d) Wq + (c - d colsum(Wq)), with the rounded weight."""
    front, ctx = "canonicalize,annotate,compand-gelu,rtn", context("ort", scheme)
    coded, _ = run_passes(block(), registry.parse(front), arrays(), ctx)
    moved, reports = run_passes(coded, registry.parse("bias-reparam"), arrays(), ctx)
    assert said(reports, "bias-reparam") == [("applied", "fc2", "the shift of its codes moved into its bias")]
    shifts = [d.qparams.curve[2] for m in (coded, moved) for d in gelu_decisions(m) if d.qparams is not None]
    assert shifts[0] > 0.16 and shifts[1] == 0.0
    ends = [run_passes(m, registry.parse("insert-qdq"), arrays(), ctx)[0] for m in (coded, moved)]
    assert relative_error(outputs(ends[0], arrays()), outputs(ends[1], arrays())) <= 2e-6
    again, _ = run_passes(moved, registry.parse("bias-reparam"), arrays(), ctx)
    assert again.digest() == moved.digest()


def gelu_decisions(model: Model) -> list:
    return [d for _, _, d in decisions(model.graph) if d.spec.qtype.name.startswith("adalog")]


def test_bias_reparam_alone_brings_its_codes() -> None:
    made, reports = pipeline("bias-reparam", block(), arrays(), context("ort"))
    assert [r.kind for r in reports[-2].remarks + reports[-1].remarks if r.pass_name == "bias-reparam"] == ["applied"]
    assert "Less" in print_model(made)


# ---- two branches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["split-range", "split-range{softmax mlp=false}", "split-range{softmax}"])
@pytest.mark.parametrize("target", ["trt", "ort"])
def test_split_range_keeps_the_function_and_quantizes_both(spec: str, target: str) -> None:
    done = step(registry.parse(spec)[0], block(), arrays(), context(target))
    assert done.changed and relative_error(outputs(done.before, arrays()), outputs(done.after, arrays())) <= 1e-6
    if target == "ort":
        return
    made, _ = pipeline(spec, block(), arrays(), context("trt"))
    assert not [f for f in check(made.to_proto(), "trt") if f.severity == "error"]
    for n in made.graph:
        if str(n.name).endswith(("_first", "_second")):
            assert {v.producer().op_type for v in n.inputs} == {"DequantizeLinear"}, n.name  # type: ignore[union-attr]


@pytest.mark.parametrize("which", ["mlp", "softmax"])
def test_the_sum_of_the_branches_is_the_piecewise_quantizer(which: str) -> None:
    """Bit for bit: steps and weights are powers of two, so that sums are exact."""
    x = np.abs(points()) if which == "softmax" else points()
    rows = x.reshape(-1)[: 2**14].reshape(4, 16, 256)
    low, high, split = twin_branches(1.0, 3, 8, True)
    low_scale, high_scale = (low[0], high[0]) if which == "softmax" else (2.0**-7, 2.0**-9)
    parts = (rows < np.float32(split)) if which == "softmax" else (rows > 0)
    pieces = [np.where(parts, rows, 0), np.where(parts, 0, rows)]
    expected = np.zeros_like(rows)
    for piece, s in zip(pieces, (low_scale, high_scale), strict=True):
        expected += np.clip(np.rint(piece / np.float32(s)), -128, 127) * np.float32(s)
    model = branch_model(which, split)
    for n, d in ((n, s) for n, s in zip(branches(model), (low_scale, high_scale), strict=True)):
        slot_decision = decision(n, 0)
        assert slot_decision is not None
        decide(n, 0, slot_decision.with_qparams(QParams(np.asarray(d), np.zeros((), np.int64))))
    lowered, _ = run_passes(model, registry.parse("rtn,insert-qdq"), {"x": rows}, context("trt"))
    assert np.array_equal(outputs(lowered, {"x": rows})[0], 127 * expected)


def branches(model: Model) -> list[ir.Node]:
    return [n for n in model.graph if n.op_type == "MatMul" and str(n.name).endswith(("_first", "_second"))]


def branch_model(which: str, split: float) -> Model:
    """Two products with 127 I, whose weight scale is 1, over the parts of x, decided for INT8."""
    eye = np.eye(256, dtype=np.float32) * 127
    constants = {"w1": eye, "w2": eye, "split": np.float32(split), "zero": np.float32(0)}
    cut = [
        node("Less", ["x", "split"], ["c"], name="below"),
        node("Where", ["c", "x", "zero"], ["a"], name="low"),
        node("Sub", ["x", "a"], ["b"], name="high"),
    ]
    signs = [node("Relu", ["x"], ["a"], name="pos"), node("Min", ["x", "zero"], ["b"], name="neg")]
    nodes = [
        *(cut if which == "softmax" else signs),
        node("MatMul", ["a", "w1"], ["p"], name="fc_first"),
        node("MatMul", ["b", "w2"], ["q"], name="fc_second"),
        node("Add", ["p", "q"], ["y"], name="sum"),
    ]
    x = {"x": np.abs(points()).reshape(-1)[: 2**14].reshape(4, 16, 256)}
    used = constants if which == "softmax" else {k: v for k, v in constants.items() if k != "split"}
    ctx = context("trt", quantize=("fc_first", "fc_second"))
    return run_passes(built(nodes, ["N", 16, 256], used, opset=19), registry.parse("annotate"), x, ctx)[0]


def test_one_scale_each() -> None:
    model, _ = pipeline("split-range", block(), arrays(), context("trt"))
    branch_scales = {
        str(n.name): float(const_array(n.inputs[0].producer().inputs[1]))  # type: ignore[arg-type,union-attr]
        for n in branches(model)
    }
    assert len(set(branch_scales.values())) == 2


# ---- FP8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["trt", "rtx"])
def test_powers_of_two_feed_an_fp8_product(target: str) -> None:
    made, reports = pipeline("annotate{attention=all},log2-softmax{deploy=fp8}", block(), arrays(), context(target, "fp8"))
    (remark,) = [r for x in reports for r in x.remarks if r.pass_name == "log2-softmax"]
    assert remark.kind == "applied" and float(remark.numbers["plain_fp8_sqnr_db"]) > float(remark.numbers["sqnr_db"])
    assert not [f for f in check(made.to_proto(), target) if f.severity == "error"]
    pv = next(n for n in made.graph if n.name == "pv")
    quantize = pv.inputs[0].producer().inputs[0].producer()  # type: ignore[union-attr]
    assert quantize is not None and quantize.op_type == "QuantizeLinear"
    reference = outputs(block(), arrays())[0]
    assert sqnr_db(reference, outputs(made, arrays())[0]) > 15


# ---- a trained transformer ------------------------------------------------------------------------------------------


@cache
def trained() -> tuple[Model, dict[str, NDArray[np.float32]], NDArray[np.float32], NDArray[np.float32]]:
    """vit_digits with transplanted outliers, calibration images, images to measure on, and its answers."""
    images = {k: np.load(MODELS / f"vit_digits.{k}.npz")["input"] for k in ("calib", "eval")}
    source = transplant(Model.load(MODELS / "vit_digits.onnx"))
    return source, {"input": images["calib"][:16]}, images["eval"][:50], outputs(source, {"input": images["eval"][:50]})[0]


@cache
def trained_db(passes: str) -> float:
    source, calibration, measured, reference = trained()
    made, _ = pipeline(f"repq,{passes}", source, calibration, context("ort"))
    return sqnr_db(reference, outputs(made, {"input": measured})[0])


@pytest.mark.parametrize(("kind", "gain"), [("log2", 1), ("log-sqrt2", 4), ("sulq", 4), ("adalog", 4), ("tan", 4), ("twin", 4)])
def test_four_bits_of_probability_on_the_transplanted_transformer(kind: str, gain: float) -> None:
    """Uniform codes lose to all others (22.4 dB against 25.4 to 32.6, `tools/bench_companding.py --outliers`)."""
    assert trained_db(f"log2-softmax{{kind={kind} bits=4}}") >= trained_db("log2-softmax{kind=uniform bits=4}") + gain
