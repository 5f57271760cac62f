"""The overflow proof: bounds are true and tight where they can be, and what cannot be proven is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from qcompile.errors import DataError, GateError
from qcompile.oracle import checked
from qcompile.oracle.ranges import prove
from qcompile.oracle.run import run_integer
from qcompile.target.check import check
from tests.oracle.build import model_of, node, on_ort, on_reference, requantize_constants, requantize_nodes
from tests.oracle.cases import CASES, Case, wide

X = np.array([[3, -7]], np.int8)
I64 = np.array([5, -3])


def kinds(model: onnx.ModelProto) -> set[str]:
    return {p.kind for p in prove(model).problems}


def rules(model: onnx.ModelProto) -> set[str]:
    return {f.rule for f in check(model, "integer") if f.severity == "error"}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_what_an_operator_makes_lies_within_its_bound(case: Case) -> None:
    """Inputs as constants: their ranges are their values, so that the bound is as tight as the analysis can make it."""
    kept = next(iter(case.inputs))
    model = model_of([case.node], {kept: case.inputs[kept]}, case.node.output, {**case.constants, **_without(case.inputs, kept)})
    proof = prove(model)
    if any(p.kind == "unbounded" for p in proof.problems):
        assert case.node.op_type.startswith("Bitwise")
        return
    made = run_integer(model, {kept: case.inputs[kept]})
    (bound,) = proof.bounds
    for y in made.values():
        assert (bound.lo <= int(y.min()) and int(y.max()) <= bound.hi) or bound.dtype == "bool" or "cast" in kinds(model)


def _without(inputs: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k != name}


def test_products_are_bounded_per_output_channel_from_the_weights() -> None:
    w = np.array([[1, -100], [2, -100]], np.int8)
    nodes = [node("MatMulInteger", ["x", "w"], "acc"), node("Mul", ["acc", "s"], "y")]
    model = model_of(nodes, {"x": X}, ["y"], {"w": w, "s": np.array([1000, 1], np.int32)})
    first, second = prove(model).bounds
    assert (first.lo, first.hi) == (-200 * 127, 200 * 128)
    assert second.hi == 3 * 127 * 1000, "the large factor meets the small column"
    assert prove(model).worst == second


def test_partial_sums_count() -> None:
    """127 * 100 - 127 * 100 ends at 0 but passes 12700."""
    model = model_of([node("MatMulInteger", ["x", "w"], "y")], {"x": X}, ["y"], {"w": np.array([[100], [-100]], np.int8)})
    assert prove(model).bounds[0].hi == 100 * 127 + 100 * 128


def test_int32_overflow_is_found() -> None:
    k = 1 << 17
    nodes = [node("MatMulInteger", ["x", "w"], "y")]
    for n, expected in ((k - 1, set[str]()), (k, {"QC-INT-003"})):
        model = model_of(nodes, {"x": np.zeros((1, n), np.int8)}, ["y"], {"w": np.full((n, 1), -128, np.int8)})
        assert rules(model) == expected


TO64 = node("Cast", ["x"], "i", to=TensorProto.INT64)
LOOK_UP = [TO64, node("Add", ["i", "o"], "j"), node("Gather", ["t", "j"], "y")]
TABLE = {"t": np.arange(256), "o": np.asarray(129)}
PICTURE = np.zeros((1, 1, 3, 3), np.int8)
SHIFT = node("BitShift", ["x", "s"], "y", direction="RIGHT")
PROBLEMS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], dict[str, Any], str | None]] = {
    "int64 product": ([node("Mul", ["x", "x"], "y")], {"x": I64}, {}, "QC-INT-004"),
    "shift": ([SHIFT], {"x": I64.astype(np.uint64)}, {"s": np.asarray(64, np.uint64)}, "QC-INT-005"),
    "cast": ([node("Cast", ["x"], "y", to=TensorProto.INT8)], {"x": I64}, {}, "QC-INT-006"),
    "division": ([node("Div", ["x", "x"], "y")], {"x": X}, {}, "QC-INT-007"),
    "index": (LOOK_UP, {"x": X}, TABLE, "QC-INT-008"),
    "computed weights": ([node("ConvInteger", ["x", "w"], "y")], {"x": PICTURE, "w": PICTURE}, {}, "QC-INT-009"),
    "comparison": ([node("Max", ["x", "o"], "y")], {"x": I64}, {"o": np.asarray(0)}, "QC-INT-012"),
    "small sum": ([node("ReduceSum", ["x"], "y")], {"x": I64.astype(np.int32)}, {}, None),
    "operator": ([node("Pow", ["x", "x"], "y")], {"x": I64.astype(np.int32)}, {}, "QC-INT-002"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_cannot_be_proven_is_named(name: str) -> None:
    nodes, inputs, constants, rule = PROBLEMS[name]
    model = model_of(nodes, inputs, ["y"], constants)
    found = [f for f in check(model, "integer") if f.severity == "error" and f.rule != "QC-INT-003"]
    if rule is None:
        assert not found
    else:
        assert rule in {f.rule for f in found} and {f.node for f in found} == {"y_node"}


def test_a_wide_sum_is_found_and_is_wrong_in_onnx_runtime_only() -> None:
    x = np.full((1, 8), (1 << 52) + 1)
    nodes = [node("Cast", ["c"], "i", to=TensorProto.INT64), node("Mul", ["i", "s"], "m"), node("ReduceSum", ["m"], "y")]
    model = model_of(nodes, {"c": X}, ["y"], {"s": np.asarray(1 << 50)})
    assert rules(model) == {"QC-INT-013"}
    plain = model_of([node("ReduceSum", ["x"], "y")], {"x": x}, ["y"])
    assert run_integer(plain, {"x": x})["y"].item() == on_reference(plain, {"x": x})[0].item() == 8 * ((1 << 52) + 1)


def test_wide_comparisons_the_oracle_and_the_reference_agree() -> None:
    """ONNX Runtime 1.31 answers 3037000499 everywhere (pull request 25280); the rule keeps such graphs from being made."""
    x = {"x": np.array([417692, 5, -4, 1 << 40])}
    model = model_of([node("Clip", ["x", "l", "h"], "y")], x, ["y"], {"l": np.asarray(1), "h": np.asarray(3037000499)})
    assert run_integer(model, x)["y"].tolist() == on_reference(model, x)[0].tolist() == [417692, 5, 1, 3037000499]
    assert rules(model) == {"QC-INT-012"}


def test_requantization_is_proven() -> None:
    constants = {"m": np.array([(1 << 31) - 1]), "e": np.array([31], np.uint64), **requantize_constants("y", np.array([31]))}
    model = model_of(requantize_nodes("acc", "y", "m", "e"), {"acc": np.zeros((1, 4), np.int32)}, ["y"], constants)
    proof = prove(model)
    assert proof.complete and proof.worst is not None and proof.worst.margin_bits >= 0
    assert proof.bounds[-1].to_json() | {"lo": -128, "hi": 127, "bits": 8, "dtype": "int8"} == proof.bounds[-1].to_json()


def test_the_remainder_lemma_bounds_a_table_index() -> None:
    nodes = [
        node("Cast", ["x"], "i", to=TensorProto.INT64),
        node("Add", ["i", "o"], "d"),
        node("Div", ["d", "c"], "q"),
        node("Mul", ["q", "c"], "b"),
        node("Sub", ["d", "b"], "r"),
        node("Gather", ["t", "r"], "y"),
    ]
    model = model_of(nodes, {"x": X}, ["y"], {"o": np.asarray(128), "c": np.asarray(16), "t": np.arange(16)})
    assert prove(model).complete and rules(model) == set()


@pytest.mark.parametrize(("test", "lo", "hi"), [("Less", -3, (1 << 63) - 1), ("Greater", -(1 << 63), -3)])
def test_where_with_a_comparison_is_max_or_min(test: str, lo: int, hi: int) -> None:
    """The form that ONNX Runtime computes right on any int64; with the sides exchanged it says nothing."""
    bound = {"b": np.asarray(-3)}
    for sides, expected in ((["b", "x"], (lo, hi)), (["x", "b"], (-(1 << 63), (1 << 63) - 1))):
        nodes = [node(test, ["x", "b"], "c"), node("Where", ["c", *sides], "y")]
        made = prove(model_of(nodes, {"x": I64}, ["y"], bound)).bounds[-1]
        assert (made.lo, made.hi) == expected


def test_axes_of_unknown_length_are_assumed_and_said() -> None:
    nodes = [node("MatMulInteger", ["a", "b"], "y")]
    model = model_of(nodes, {"a": np.zeros((2, 4), np.int8), "b": np.zeros((4, 2), np.int8)}, ["y"])
    for i, axis in ((0, 1), (1, 0)):
        model.graph.input[i].type.tensor_type.shape.dim[axis].dim_param = "T"
    proof = prove(model)
    assert proof.complete and proof.bounds[0].hi == 1 << 29
    assert "at most 32768" in proof.assumptions[0]


# ---- the oracle itself never wraps --------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_an_overflow_names_the_node(op: str, dtype: Any) -> None:
    top = np.iinfo(dtype)
    x = {"a": np.array([top.max, 1], dtype), "b": np.array([-2, 1] if op == "Sub" else [2, 1], dtype)}
    model = model_of([node(op, ["a", "b"], "y")], x, ["y"])
    with pytest.raises(GateError, match=r"'y_node'.*overflow"):
        run_integer(model, x)


def test_mixed_extremes_that_do_not_overflow_are_exact() -> None:
    a = {"a": np.array([np.iinfo(np.int64).max, 1]), "b": np.array([1, -(1 << 62)])}
    model = model_of([node("Mul", ["a", "b"], "y")], a, ["y"])
    assert run_integer(model, a)["y"].tolist() == [np.iinfo(np.int64).max, -(1 << 62)]


def test_division_by_zero_and_missing_codes_are_errors() -> None:
    model = model_of([node("Div", ["a", "b"], "y")], {"a": I64, "b": I64}, ["y"])
    with pytest.raises(GateError, match="division by zero"):
        run_integer(model, {"a": I64, "b": np.array([0, 1])})
    with pytest.raises(DataError, match="'b'"):
        run_integer(model, {"a": I64})
    with pytest.raises(checked.Overflow):
        checked.divide(np.array([np.iinfo(np.int64).min]), np.array([-1]))


def test_wide_divisions_truncate() -> None:
    a, b = wide(500), wide(500)
    b[b == 0] = 1
    assert checked.divide(a, b).tolist() == [
        abs(int(p)) // abs(int(q)) * (1 if (p < 0) == (q < 0) else -1) for p, q in zip(a, b, strict=True)
    ]
    assert (
        on_ort(model_of([node("Div", ["a", "b"], "y")], {"a": a, "b": b}, ["y"]), {"a": a, "b": b})[0].tolist()
        == checked.divide(a, b).tolist()
    )
