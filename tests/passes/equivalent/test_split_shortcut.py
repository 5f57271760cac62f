from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from qcompile.decide.decisions import decisions
from qcompile.ir.model import Model
from qcompile.pipeline import registry
from qcompile.target.check import check
from tests.passes.equivalent.joined import SHAPE, joined, nested, tokens
from tests.passes.measures import constants_of, double_outputs, op_types, outputs, relative_error, sqnr_db, to_double
from tests.passes.running import SweepOf, context, pipeline, run_passes, run_with


def arrays(samples: int = 8, seed: int = 0) -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(seed).standard_normal((samples, *SHAPE)).astype(np.float32)}


def split(model: Model, spec: str = "split-shortcut", **options: Any) -> tuple[Model, list[Any]]:
    after, reports = run_passes(model, registry.parse(f"canonicalize,{spec}"), arrays(), context(**options))
    return after, list(reports[-1].remarks)


@pytest.mark.parametrize(
    "make",
    [joined, lambda: joined(groups=2, sizes=(6, 6)), lambda: joined(groups=3, sizes=(8, 4)), nested, tokens],
    ids=["asymmetric pads", "two groups", "three groups", "nested", "tokens"],
)
def test_branches_add_up_to_the_layer(make: Callable[[], Model]) -> None:
    model = make()
    after, remarks = split(model)
    assert any(r.kind == "applied" for r in remarks)
    assert relative_error(outputs(model, arrays(seed=1)), outputs(after, arrays(seed=1))) < 1e-6


@pytest.mark.parametrize("make", [joined, nested, tokens])
def test_the_sum_is_exact_in_float64(make: Callable[[], Model]) -> None:
    model = make()
    wide = to_double(model)
    after, _ = run_with(SweepOf(model, arrays()).collect, wide, registry.parse("split-shortcut"), context())
    assert relative_error(double_outputs(wide, arrays(2)), double_outputs(after, arrays(2))) < 1e-14


def test_the_bias_stands_in_one_branch_and_the_parts_are_read_directly() -> None:
    after, remarks = split(joined())
    assert op_types(after) == ["Conv", "Conv", "Conv", "Conv", "Add"]
    branches = [n for n in after.graph if str(n.name).startswith("conv_part")]
    assert [len(n.inputs) for n in branches] == [3, 2]
    assert [r.reason for r in remarks if r.kind == "applied"] == ["split into branches of 8 + 4 channels"]
    assert {k: v.shape for k, v in constants_of(after).items() if k.endswith("_weight")} == {
        "conv_part0_weight": (12, 8, 2, 2),
        "conv_part1_weight": (12, 4, 2, 2),
    }


def test_concats_of_concats_are_followed() -> None:
    after, remarks = split(nested())
    assert {r.node: r.reason for r in remarks if r.kind == "applied"} == dict.fromkeys(
        ["skip", "body"], "split into branches of 4 + 4 + 4 channels"
    )
    assert op_types(after).count("Split") == 1, "the 1x1 layer reads the parts, only the one behind Relu is cut"


def test_like_ranges_are_left_alone() -> None:
    model = joined(factor=1.0, sizes=(6, 6))
    after, remarks = split(model)
    assert after.digest() == split(model, "canonicalize")[0].digest()
    assert [(r.kind, r.node, r.reason) for r in remarks] == [
        ("missed", "conv", "scales of their own would gain the joined parts too little")
    ]


def test_the_predicted_gain_decides() -> None:
    """Boxes beside scores are worth a second layer in the default; parts twice as large as others are not."""
    for factor, done in ((2.0, False), (100.0, True)):
        _, remarks = split(joined(factor=factor), "split-shortcut{gain=6}")
        (told,) = [r for r in remarks if r.node == "conv"]
        assert (told.kind == "applied") == done and (told.numbers["gain_db"] >= 6) == done


def test_small_floats_gain_nothing() -> None:
    _, remarks = split(joined(factor=100.0), scheme="fp8")
    assert [(r.kind, r.numbers["gain_db"]) for r in remarks] == [("missed", 0.0)]


def test_groups_over_the_border_are_refused() -> None:
    model = joined(groups=2)
    after, remarks = split(model)
    assert [(r.kind, r.node) for r in remarks] == [("missed", "conv")]
    assert "groups of 6 channels that reach over the border" in remarks[0].reason
    assert "Add" not in op_types(after)


def test_a_computed_bias_is_refused() -> None:
    model = joined()
    conv = next(n for n in model.graph if n.name == "conv")
    make = ir.node("Identity", [model.graph.initializers["c"]], name="bias")
    computed = ir.node("Mul", [make.outputs[0], make.outputs[0]], name="computed")
    model.graph.insert_before(conv, [make, computed])
    conv.replace_input_with(2, computed.outputs[0])
    after, remarks = run_split_alone(model)
    assert after.digest() == model.digest() and [(r.kind, r.node) for r in remarks] == [("missed", "conv")]
    assert "the bias of Conv conv is not constant" in remarks[0].reason


def run_split_alone(model: Model) -> tuple[Model, list[Any]]:
    after, (report,) = run_passes(model, registry.parse("split-shortcut"), arrays(), context())
    return after, list(report.remarks)


def test_selectors_keep_the_layer() -> None:
    _, remarks = split(joined(), keep_float=("conv",))
    assert [(r.kind, r.node) for r in remarks] == [("missed", "conv")]


@pytest.mark.parametrize("target", ["trt", "ort"])
def test_a_range_ratio_of_20_gains_6_db_at_8_bit(target: str) -> None:
    model, feeds = joined(), arrays(32, seed=2)
    found = {}
    for spec in ("", "split-shortcut"):
        quantized, _ = pipeline(spec, model, arrays(32), context(target, quantize=("conv",)))
        assert not [f for f in check(quantized.to_proto(), target) if f.severity == "error"]
        found[spec] = sqnr_db(outputs(model, feeds)[0], outputs(quantized, feeds)[0])
    assert found["split-shortcut"] - found[""] >= 6.0, found


def test_each_branch_has_scales_of_its_own() -> None:
    model, _ = run_passes(joined(), registry.parse("canonicalize,split-shortcut,annotate"), arrays(), context("trt"))
    held = {str(n.name): d for n, slot, d in decisions(model.graph) if slot == 0 and str(n.name).startswith("conv_part")}
    assert len(held) == 2 and len(set(held.values())) == 2
