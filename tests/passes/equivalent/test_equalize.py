from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from qcompile.ir.model import Model
from qcompile.pipeline import registry
from tests.passes.measures import constants_of, op_types, outputs, relative_error, sqnr_db
from tests.passes.models import built
from tests.passes.running import context, pipeline, run_passes

node = helper.make_node
ROOT = Path(__file__).parents[3]


def arrays(samples: int = 8, seed: int = 0) -> dict[str, Any]:
    return {"x": np.random.default_rng(seed).standard_normal((samples, 4, 9, 9)).astype(np.float32)}


def triple(act: str = "Relu", pad: int = 0) -> Model:
    """Conv 1x1 -> act -> depthwise 3x3 -> act -> Conv 1x1, with channels of ranges 1 to 64 that matter alike."""
    rng = np.random.default_rng(1)
    spread = (4.0 ** np.linspace(0, 3, 8)).astype(np.float32)
    w = {"w1": (8, 4, 1, 1), "w2": (8, 1, 3, 3), "w3": (4, 8, 1, 1), "c1": (8,), "c2": (8,), "c3": (4,)}
    held: dict[str, Any] = {n: (rng.standard_normal(s) * 0.4).astype(np.float32) for n, s in w.items()}
    held |= {"zero": np.array(0, np.float32), "six": np.array(6, np.float32), "slope": np.full((8, 1, 1), 0.1, np.float32)}
    held["w1"] *= spread[:, None, None, None]
    held["c1"] *= spread
    held["c2"] *= spread
    held["w3"] /= spread[:, None, None]
    extra = {"Clip": ["zero", "six"], "PRelu": ["slope"]}.get(act, [])
    acts = [node(act, [f"z{i}", *extra], [f"a{i}"], name=f"act{i}") for i in (1, 2)]
    nodes = [
        node("Conv", ["x", "w1", "c1"], ["z1"], name="expand"),
        acts[0],
        node("Conv", ["a1", "w2", "c2"], ["z2"], name="depthwise", group=8, pads=[pad] * 4),
        acts[1],
        node("Conv", ["a2", "w3", "c3"], ["y"], name="project"),
    ]
    read = {n for x in nodes for n in x.input}
    return built(nodes, ["N", 4, 9, 9], {n: v for n, v in held.items() if n in read})


def equalized(model: Model, spec: str = "equalize", **options: Any) -> tuple[Model, list[Any]]:
    after, reports = run_passes(model, registry.parse(f"canonicalize,{spec}"), arrays(), context(**options))
    return after, list(reports[-1].remarks)


@pytest.mark.parametrize("act", ["Relu", "Clip", "LeakyRelu"])
@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("spec", ["equalize", "equalize{by=weights}", "equalize{steps=64 alpha=0.5}", "equalize{center=false}"])
def test_the_function_stays(spec: str, act: str, pad: int) -> None:
    model = triple(act, pad)
    after, remarks = equalized(model, spec)
    assert any(r.kind == "applied" for r in remarks)
    assert relative_error(outputs(model, arrays(seed=1)), outputs(after, arrays(seed=1))) < 2e-6


def test_powers_of_two_are_exact() -> None:
    model = triple()
    after, _ = equalized(model, "equalize{center=false}")
    assert relative_error(outputs(model, arrays(seed=1)), outputs(after, arrays(seed=1))) == 0.0


def test_a_depthwise_triple_gets_one_weight_range() -> None:
    """r1 = r2 = r3 in every channel (Nagel et al. 2019, appendix A)."""
    after, _ = equalized(triple(), "equalize{by=weights center=false steps=1024}")
    weights = [a.astype(float) for a in constants_of(after).values() if a.ndim == 4]
    w1, w2 = (next(a for a in weights if a.shape == s) for s in ((8, 4, 1, 1), (8, 1, 3, 3)))
    w3 = next(a for a in weights if a.shape == (4, 8, 1, 1))
    tops = [np.abs(w1).max((1, 2, 3)), np.abs(w2).max((1, 2, 3)), np.abs(w3).max((0, 2, 3))]
    for top in tops[1:]:
        ratio = top / tops[0]
        assert ratio.max() / ratio.min() < 1.1, "equal up to one factor a layer"


def test_relu6_keeps_its_bound_in_every_channel() -> None:
    after, _ = equalized(triple("Clip"), "equalize{center=false}")
    assert op_types(after)[1:3] == ["Relu", "Min"]
    (bound,) = [a for n, a in constants_of(after).items() if n == "act1_min"]
    assert bound.shape == (1, 8, 1, 1) and len(np.unique(bound)) > 1


def test_centring_needs_convolutions_without_padding() -> None:
    free, padded = (equalized(triple(pad=p))[1] for p in (0, 1))
    assert [("centred" in r.reason) for r in free if r.kind == "applied"] == [True, True]
    assert [("centred" in r.reason) for r in padded if r.kind == "applied"] == [False, True]


@pytest.mark.parametrize(
    ("act", "words"), [("Sigmoid", "not positively homogeneous"), ("HardSwish", "not positively homogeneous"), ("PRelu", "prelu")]
)
def test_other_activations_are_refused(act: str, words: str) -> None:
    model = triple(act)
    after, remarks = equalized(model, "equalize{insert=false}")
    assert after.digest() == equalized(model, "canonicalize")[0].digest()
    assert words in next(r.reason for r in remarks if r.kind == "missed" and r.node == "expand")


@pytest.mark.parametrize("act", ["Sigmoid", "HardSwish", "PRelu"])
def test_a_mul_stands_in_front_of_a_depthwise_convolution_that_no_fold_reaches(act: str) -> None:
    model = triple(act, pad=1)
    before = equalized(model, "canonicalize")[0]
    after, remarks = equalized(model)
    assert [(r.node, r.kind) for r in remarks if r.kind == "applied"] == [("depthwise", "applied")] * (act != "Sigmoid")
    assert op_types(after).count("Mul") - op_types(before).count("Mul") == (act != "Sigmoid")
    assert relative_error(outputs(before, arrays(seed=1)), outputs(after, arrays(seed=1))) < 1e-6


def test_the_mul_pays_in_decibels_and_only_the_depthwise_convolution_reads_it() -> None:
    model, found = triple("HardSwish"), {}
    for spec in ("", "equalize"):
        after, _ = pipeline(spec, model, arrays(32), context("rtx"))
        found[spec] = sqnr_db(outputs(model, arrays(32, 5))[0], outputs(after, arrays(32, 5))[0])
    assert found["equalize"] > found[""] + 3, found


def odd(form: str) -> Model:
    """Pairs that the equality f(s x) = s f(x) does not reach."""
    rng = np.random.default_rng(2)
    held: dict[str, Any] = {"w1": rng.standard_normal((8, 4, 1, 1)).astype(np.float32)}
    held["w2"] = rng.standard_normal((8, 4, 1, 1) if form == "transposed" else (4, 8, 1, 1)).astype(np.float32)
    nodes = [
        node("Conv", ["x", "w1", *(["c"] if form == "computed" else [])], ["z"], name="expand"),
        node("Relu", ["z"], ["a"], name="act"),
        node("ConvTranspose" if form == "transposed" else "Conv", ["a", "w2"], ["y"], name="project"),
    ]
    if form == "computed":
        held["e"] = rng.standard_normal((4, 8)).astype(np.float32)
        nodes[:0] = [
            node("ReduceMean", ["x"], ["m"], name="mean", axes=[0, 2, 3], keepdims=0),
            node("MatMul", ["m", "e"], ["c"], name="bias"),
        ]
    if form == "shared":
        nodes.append(node("Sigmoid", ["a"], ["y2"], name="other"))
    return built(nodes, ["N", 4, 9, 9], held, outs=["y", "y2"] if form == "shared" else ["y"])


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("shared", "its output feeds 2 nodes"),
        ("transposed", "a transposed convolution"),
        ("computed", "the bias of expand is not constant"),
    ],
)
def test_pairs_that_stay(form: str, words: str) -> None:
    model = odd(form)
    after, remarks = equalized(model)
    assert after.digest() == equalized(model, "canonicalize")[0].digest()
    assert words in next(r.reason for r in remarks if r.kind == "missed" and r.node == "expand")


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("by", ["weights", "activations"])
def test_grouped_convolutions(groups: int, by: str) -> None:
    rng = np.random.default_rng(3)
    spread = (4.0 ** np.linspace(0, 3, 8)).astype(np.float32)
    w1, w2 = rng.standard_normal((8, 4, 1, 1)).astype(np.float32), rng.standard_normal((12, 8 // groups, 3, 3)).astype(np.float32)
    nodes = [
        node("Conv", ["x", "w1"], ["z"], name="expand"),
        node("Relu", ["z"], ["a"], name="act"),
        node("Conv", ["a", "w2"], ["y"], name="grouped", group=groups),
    ]
    model = built(nodes, ["N", 4, 9, 9], {"w1": w1 * spread[:, None, None, None], "w2": w2})
    after, remarks = equalized(model, f"equalize{{by={by}}}")
    assert [r.node for r in remarks if r.kind == "applied"] == ["expand"]
    assert relative_error(outputs(model, arrays(seed=1)), outputs(after, arrays(seed=1))) < 2e-6


def test_padding_in_front_of_a_centred_range_is_remarked() -> None:
    _, remarks = equalized(triple("Clip", pad=1))
    (note,) = [r for r in remarks if r.kind == "note"]
    assert note.node == "expand" and "depthwise pads with zeros" in note.reason


def test_selectors_keep_a_pair() -> None:
    _, remarks = equalized(triple(), keep_float=("depthwise",))
    assert {r.node for r in remarks if r.kind == "missed" and "--keep-float" in r.reason} == {"expand", "depthwise"}


def test_per_tensor_codes_gain() -> None:
    model, found = triple(), {}
    for spec in ("", "equalize"):
        after, _ = pipeline(spec, model, arrays(32), context("ort"))
        found[spec] = sqnr_db(outputs(model, arrays(32, 5))[0], outputs(after, arrays(32, 5))[0])
    assert found["equalize"] > found[""] + 1.0, found


def test_mobilenet_keeps_its_outputs() -> None:
    model = Model.load(ROOT / "models/mobilenet_v1_025_224.onnx")
    rng = np.random.default_rng(0)
    feeds = {"input": rng.uniform(-1, 1, (2, 3, 224, 224)).astype(np.float32)}
    for spec, bound in (("equalize{center=false}", 0.0), ("equalize", 5e-6)):
        after, reports = run_passes(model, registry.parse(f"canonicalize,fold-bn,fold-pad,{spec}"), feeds, context())
        assert sum(r.kind == "applied" for r in reports[-1].remarks) > 15
        assert relative_error(outputs(model, feeds), outputs(after, feeds)) <= bound
