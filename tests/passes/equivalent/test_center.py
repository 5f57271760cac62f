from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

import qcompile
from qcompile.calib.observe import MinMax, MinMaxStat, Probe
from qcompile.calib.sweep.sweep import sweep
from qcompile.decide.decisions import decide
from qcompile.decide.quantizer import Quantizer
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array
from qcompile.pipeline import registry
from qcompile.quant.affine import qparams_from_range
from qcompile.quant.qtype import INT8, QType, simulated_int
from qcompile.quant.spec import QuantSpec
from tests.passes.equivalent import streams
from tests.passes.measures import op_types, outputs, relative_error, sqnr_db
from tests.passes.models import built
from tests.passes.running import context, dataset, pipeline, run_passes

node = helper.make_node
C, T = 16, 6
PARTS = ("k", "v", "norm")


def arrays(samples: int = 8, seed: int = 0) -> dict[str, Any]:
    return {"x": np.random.default_rng(seed).standard_normal((samples, T, C)).astype(np.float32)}


def attention(form: str = "plain", offset: float = 4.0, opset: int = 17) -> Model:
    """LayerNorm -> q, k, v of one head -> softmax -> projection; keys, values and the norm are far from zero.

    form: plain; softcap (Tanh on the scores); clip; weighed (scores times a vector over the keys); cache, v-cache (k or v is
    returned);
    where-low, where-high (a mask that puts -1e9, or 0, in place of scores).
    """
    rng = np.random.default_rng(3)
    weights: dict[str, Any] = {f"w{p}": (rng.standard_normal((C, C)) * 0.3).astype(np.float32) for p in "qkvo"}
    weights |= {f"b{p}": (rng.standard_normal(C) * 0.3 + offset * (p in "kv")).astype(np.float32) for p in "qkvo"}
    weights |= {
        "g": np.ones(C, np.float32),
        "b": (rng.standard_normal(C) * offset).astype(np.float32),
        "root": np.float32(C**-0.5),
    }
    weights |= {"w": rng.uniform(0.5, 2, T).astype(np.float32), "low": np.float32(-2), "high": np.float32(2)}
    weights |= {"mask": np.tril(np.ones((T, T), bool)), "fill": np.float32(-1e9 if form == "where-low" else 0)}
    changes = {
        "softcap": node("Tanh", ["ss"], ["st"], name="softcap"),
        "clip": node("Clip", ["ss", "low", "high"], ["st"], name="clip"),
        "weighed": node("Mul", ["ss", "w"], ["st"], name="weigh"),
        "where-low": node("Where", ["mask", "ss", "fill"], ["st"], name="where"),
        "where-high": node("Where", ["mask", "ss", "fill"], ["st"], name="where"),
    }
    nodes = [node("LayerNormalization", ["x", "g", "b"], ["n"], name="norm")]
    for p in "qkv":
        nodes += [node("MatMul", ["n", f"w{p}"], [f"m{p}"], name=p), node("Add", [f"m{p}", f"b{p}"], [p], name=f"{p}_bias")]
    nodes += [
        node("Transpose", ["k"], ["kt"], name="k_t", perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["s"], name="scores"),
        node("Mul", ["s", "root"], ["ss"], name="scale"),
        *([changes[form]] if form in changes else []),
        node("Softmax", ["st" if form in changes else "ss"], ["p"], name="softmax", axis=-1),
        node("MatMul", ["p", "v"], ["o"], name="pv"),
        node("MatMul", ["o", "wo"], ["mo"], name="out"),
        node("Add", ["mo", "bo"], ["y"], name="out_bias"),
    ]
    read = {n for x in nodes for n in x.input}
    held = {n: v for n, v in weights.items() if n in read}
    return built(nodes, ["N", T, C], held, opset, outs=["y", *{"cache": "k", "v-cache": "v"}.get(form, "")])


def centred(model: Model, spec: str = "center", **options: Any) -> tuple[Model, list[Any]]:
    after, reports = run_passes(model, registry.parse(f"canonicalize,{spec}"), arrays(), context(**options))
    return after, list(reports[-1].remarks)


def extremes(model: Model, name: str) -> MinMaxStat:
    probe = Probe(name, MinMax(-1))
    stat = sweep(model, dataset(arrays()), [probe], threads=1)[probe]
    assert isinstance(stat, MinMaxStat)
    return stat


@pytest.mark.parametrize("form", ["plain", "softcap", "clip", "weighed", "cache", "where-low", "where-high"])
@pytest.mark.parametrize(
    "spec", ["center", "center{balance}", "center{drop}", "center{softmax}", "center{heads balance softmax}"]
)
def test_the_function_stays(spec: str, form: str) -> None:
    model = attention(form)
    after, _ = centred(model, spec)
    assert relative_error(outputs(model, arrays(seed=1)), outputs(after, arrays(seed=1))) < 5e-6


@pytest.mark.parametrize(("part", "tensor"), [("k", "k"), ("v", "v"), ("norm", "n")])
def test_the_calibration_range_is_symmetric_afterwards(part: str, tensor: str) -> None:
    others = " ".join(f"{p}=false" for p in PARTS if p != part)
    after, remarks = centred(attention(), f"center{{{others}}}")
    stat = extremes(after, tensor)
    assert np.abs(stat.lo + stat.hi).max() < 1e-5
    (applied,) = [r for r in remarks if r.kind == "applied"]
    assert applied.numbers["centred"] < applied.numbers["largest"]


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("softcap", "Tanh softcap changes the scores before the softmax"),
        ("clip", "Clip clip changes the scores before the softmax"),
        ("weighed", "Mul weigh changes the scores before the softmax"),
        ("where-high", "Where where changes the scores before the softmax"),
        ("cache", "k is a graph output"),
    ],
)
@pytest.mark.parametrize("option", ["", " drop"])
def test_keys_that_must_stay_are_refused(form: str, words: str, option: str) -> None:
    model = attention(form)
    after, remarks = centred(model, f"center{{v=false norm=false{option}}}")
    assert after.digest() == centred(model, "canonicalize")[0].digest()
    (missed,) = [r for r in remarks if r.kind == "missed"]
    assert missed.node == "scores" and words in missed.reason


def test_values_that_something_else_reads_are_refused() -> None:
    model = attention("v-cache")
    after, remarks = centred(model, "center{heads k=false norm=false}")
    assert after.digest() == centred(model, "canonicalize")[0].digest()
    assert [(r.kind, r.node, r.reason) for r in remarks] == [("missed", "pv", "values not centred: v is the graph output v")]


def test_attention_that_cannot_be_followed_is_named() -> None:
    x = {n: np.random.default_rng(0).standard_normal((C, C)).astype(np.float32) for n in ("w1", "w2")}
    nodes = [
        node("MatMul", ["x", "w1"], ["q"], name="q"),
        node("Transpose", ["x"], ["xt"], name="x_t", perm=[0, 2, 1]),
        node("MatMul", ["q", "xt"], ["s"], name="scores"),
        node("Softmax", ["s"], ["p"], name="softmax", axis=-1),
        node("MatMul", ["p", "x"], ["o"], name="pv"),
        node("MatMul", ["o", "w2"], ["y"], name="out"),
    ]
    model = built(nodes, ["N", T, C], x)
    after, remarks = centred(model, "center{softmax}")
    assert after.digest() == centred(model, "canonicalize")[0].digest()
    assert [(r.kind, r.node) for r in remarks] == [("missed", "softmax")] and "k and v does not come from a linear" in remarks[
        0
    ].reason


def test_centred_tensors_are_left_alone() -> None:
    _, remarks = centred(attention(offset=0.0), "center{norm=false}")
    assert {r.node: r.kind for r in remarks} == {"scores": "missed", "pv": "missed"}
    assert all("centred already" in r.reason for r in remarks)


def test_balance_gives_q_and_k_one_range() -> None:
    after, _ = centred(attention(), "center{balance v=false norm=false}")
    q, k = (extremes(after, n) for n in "qk")
    tops = [np.maximum(-s.lo, s.hi) for s in (q, k)]
    assert np.allclose(tops[0], tops[1], rtol=1e-4)


def test_the_bias_of_the_keys_can_be_dropped() -> None:
    after, remarks = centred(attention(), "center{drop v=false norm=false}")
    (bias,) = [n.inputs[1] for n in after.graph if n.name == "k_bias"]
    assert not np.any(const_array(bias)) and [r.reason for r in remarks] == ["bias of the keys dropped"]
    _, again = centred(after, "center{drop v=false norm=false}")
    assert [(r.kind, r.node) for r in again] == [("missed", "scores")] and "they have no bias" in again[0].reason


def probability_range(model: Model) -> tuple[float, float]:
    (pv,) = [n for n in model.graph if n.name == "pv"]
    probe = Probe(str(pv.inputs[0].name), MinMax())  # type: ignore[union-attr]
    stat = sweep(model, dataset(arrays()), [probe], threads=1)[probe]
    assert isinstance(stat, MinMaxStat)
    return float(stat.lo), float(stat.hi)


@pytest.mark.parametrize("opset", [12, 17])
def test_probabilities_use_both_signs_and_one_sum_undoes_it(opset: int) -> None:
    model = attention(opset=opset)
    after, remarks = centred(model, "center{softmax k=false v=false norm=false}")
    assert [(r.kind, r.node, r.reason) for r in remarks] == [("applied", "softmax", "probabilities centred")]
    before, _ = centred(model, "canonicalize")
    extra = sorted(set(op_types(after)) - set(op_types(before)) - {"Sub"})
    assert extra == ["ReduceSum"] and len(after.graph) == len(before.graph) + 4
    lo, hi = probability_range(after)
    assert np.isclose(lo, -hi) and relative_error(outputs(model, arrays(seed=1)), outputs(after, arrays(seed=1))) < 1e-6


def test_probabilities_that_the_user_keeps() -> None:
    model = attention()
    after, remarks = centred(model, "center{softmax k=false v=false norm=false}", keep_float=("pv",))
    assert after.digest() == centred(model, "canonicalize")[0].digest()
    assert [(r.kind, r.node) for r in remarks] == [("missed", "softmax")] and "--keep-float" in remarks[0].reason


@pytest.mark.parametrize(("qtype", "gain"), [(INT8, 3.0), (simulated_int(4), 2.0)])
def test_symmetric_codes_of_probabilities_gain(qtype: QType, gain: float) -> None:
    """Half of the symmetric codes are negative, and no probability is: centring gives that bit back.  Only P is quantized."""
    model, found = attention(offset=0.5), {}
    for spec in ("canonicalize", "center{softmax k=false v=false norm=false}"):
        after, _ = centred(model, spec)
        (pv,) = [n for n in after.graph if n.name == "pv"]
        lo, hi = probability_range(after)
        decide(pv, 0, Quantizer(QuantSpec(qtype), qparams_from_range(lo, hi, qtype, True)))
        lowered, _ = run_passes(after, registry.parse("insert-qdq"), arrays(), context("rtx"))
        found[spec] = sqnr_db(outputs(model, arrays())[0], outputs(lowered, arrays())[0])
    plain, moved = found.values()
    assert moved > plain + gain, found


def test_the_values_of_all_heads_get_one_range() -> None:
    """Grouped heads too: the rows of W_o that read a shared head take its scale."""
    weights = streams.constants()
    weights["wv"][:, : streams.DIM] *= 30
    weights["wo"][: 2 * streams.DIM] /= 30
    model = streams.block(weights=weights)
    feeds, spec = streams.feeds(), "canonicalize,center{heads k=false v=false norm=false}"
    after, (_, report) = run_passes(model, registry.parse(spec), feeds, context())
    assert [r.reason for r in report.remarks if r.kind == "applied"] == ["heads scaled alike"]
    assert relative_error(outputs(model, streams.feeds(4, 1)), outputs(after, streams.feeds(4, 1))) < 2e-6
    probe = Probe("av", MinMax(-1))
    stat = sweep(after, dataset(feeds), [probe], threads=1)[probe]
    assert isinstance(stat, MinMaxStat)
    tops = np.maximum(-stat.lo, stat.hi).reshape(streams.KV, streams.DIM).max(1)
    assert np.allclose(tops, tops[0], rtol=1e-4)


def test_selected_layers_stay() -> None:
    _, remarks = centred(attention(), keep_float=("k", "out", "norm"))
    assert {r.node: r.kind for r in remarks if r.node in ("scores", "pv")} == {"scores": "missed", "pv": "missed"}


def test_statistics_follow_the_shift() -> None:
    """A second `center` reads the carried ranges and finds nothing left."""
    model, feeds = attention(), arrays()
    _, reports = run_passes(model, registry.parse("canonicalize,center,center"), feeds, context())
    assert not [r for r in reports[-1].remarks if r.kind == "applied"]


def test_symmetric_codes_gain() -> None:
    model, feeds = attention(), arrays(32)
    found = {}
    for spec in ("", "center"):
        after, _ = pipeline(spec, model, feeds, context("trt", quantize=("q", "k", "v", "out", "scores", "pv")))
        found[spec] = sqnr_db(outputs(model, arrays(32, 5))[0], outputs(after, arrays(32, 5))[0])
    assert found["center"] > found[""] + 1.0, found


def test_a_bias_that_the_norms_gave_a_projection_is_followed(tmp_path: Path) -> None:
    """Of projections without one: what the product was is the sum of both."""
    source = Path(__file__).parents[2] / "fixtures" / "exports" / "timm_vit_no_qkv_bias_ts17.onnx"
    options: dict[str, Any] = {"passes": "center", "target": "ort", "calib": "random", "samples": 8, "threads": 1}
    result = qcompile.compile(source, output=tmp_path / "q.onnx", **options)
    applied = {r.reason for r in result.remarks if r.pass_name == "center" and r.kind == "applied"}
    assert {"keys centred", "norm output centred"} <= applied
