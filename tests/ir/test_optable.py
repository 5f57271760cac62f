"""The table of operator facts: its names exist, its traits are used, and no set of names stands beside it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import get_args

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import TensorProto, helper

from qcompile.ir.optable import TRAITS, Trait, ops_with
from qcompile.oracle.elementwise import ELEMENTWISE
from qcompile.oracle.movement import MOVEMENT
from qcompile.oracle.run import OPERATORS
from tests.modules import sources

NAMES = frozenset(s.name for s in onnx.defs.get_all_schemas())
MOST = 6
BESIDE = {
    "passes/forms/pad_heads/weights.py:_PASSED": "what the sizes of heads are followed through, written so that they stay",
    "qcompile/target/sensitive.py:_POWERS": "what spectra are made of: squares, sums, roots",
    "passes/forms/unify_qdq/activations.py:_SIGNED": "behind what a lowest code as zero point stands for a Relu",
    "qcompile/target/openvino/placement.py:_IN_BETWEEN": "what the CPU plugin was measured to compute on codes",
}


def test_every_operator_of_the_table_exists() -> None:
    assert not TRAITS.keys() - NAMES


def test_rows_are_sorted() -> None:
    assert list(TRAITS) == sorted(TRAITS)


@pytest.mark.parametrize("trait", get_args(Trait))
def test_every_trait_is_asked_for(trait: str) -> None:
    asked = {
        arg.value
        for source in sources().values()
        for call in ast.walk(source.tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "ops_with"
        for arg in call.args
        if isinstance(arg, ast.Constant)
    }
    assert trait in asked, f"nobody reads {trait!r}: delete it from the table"


def test_several_traits_are_all_needed() -> None:
    assert ops_with("movement", "elementwise") == ops_with("copies") == {"Dropout", "Identity"}
    assert ops_with("activation") < ops_with("unary") < ops_with("elementwise")


# ---- no other set -------------------------------------------------------------------------------------------------


def names_in(tree: ast.AST) -> Iterator[tuple[int, list[str]]]:
    """(line, operators) of every set, tuple and list of strings that are nearly all operators; dicts dispatch and may stay."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Set, ast.Tuple, ast.List)):
            strings = [e.value for e in node.elts if isinstance(e, ast.Constant) and isinstance(e.value, str)]
            known = [s for s in strings if s in NAMES]
            if len(known) > MOST and len(known) > len(strings) // 2:
                yield node.lineno, known


def beside() -> Iterator[str]:
    for source in sources().values():
        if source.room == "oracle":  # judges with none of our tables
            continue
        for statement in source.tree.body:
            target = statement.targets[0] if isinstance(statement, ast.Assign) else None
            where = ast.unparse(target) if target is not None else str(statement.lineno)
            yield from (f"{source.path}:{where}" for _ in names_in(statement))


def test_no_other_set_of_operators_is_written_down() -> None:
    found = set(beside())
    assert not BESIDE.keys() - found, "no longer there: take it off the list"
    assert not found - BESIDE.keys(), f"more than {MOST} names: make the set from ops_with(..)"


# ---- tables that speak of the same --------------------------------------------------------------------------------


def test_the_oracle_says_the_same_of_movement_and_elementwise() -> None:
    shared = TRAITS.keys() & OPERATORS
    assert ops_with("movement") & shared == MOVEMENT.keys() & shared
    assert (ops_with("elementwise") - ops_with("movement")) & shared == ELEMENTWISE.keys() & shared


def keys(module: str, name: str) -> set[str]:
    """The operators that the private table `name` of a module dispatches on."""
    for statement in sources()[module].tree.body:
        if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target) == name:
            assert isinstance(statement.value, ast.Dict)
            return {k.value for k in statement.value.keys if isinstance(k, ast.Constant) and isinstance(k.value, str)}
    raise AssertionError(f"{module} has no table {name}")


def test_tables_that_dispatch_hold_operators_of_their_trait() -> None:
    plain = keys("qcompile.passes.lower.integer.elementwise", "_PLAIN")
    assert keys("qcompile.structure.activation", "BINARY") == ops_with("arithmetic")
    assert keys("qcompile.structure.activation", "UNARY") <= ops_with("unary") | ops_with("copies")
    assert plain <= ops_with("unary") | ops_with("arithmetic")
    moved = keys("qcompile.structure.channels.move", "_HANDLERS")
    assert moved - {"Cast", "GlobalAveragePool", "ReduceMean"} <= ops_with("movement")


# ---- the facts themselves -----------------------------------------------------------------------------------------


def computed(op: str, x: np.ndarray) -> np.ndarray:
    """What the reference implementation of ONNX makes of one tensor."""
    node = helper.make_node(op, ["x"], ["y"])
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", info[:1], info[1:]), opset_imports=[helper.make_opsetid("", 24)])
    made = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x})
    assert isinstance(made, list)
    return made[0]


X = np.random.default_rng(0).normal(0, 3, (4, 16)).astype(np.float32)


@pytest.mark.parametrize("op", sorted(ops_with("unary")))
def test_unary_ones_look_at_one_element(op: str) -> None:
    x, order = np.abs(X) + 0.1, np.random.default_rng(1).permutation(16)
    np.testing.assert_allclose(computed(op, x[:, order]), computed(op, x)[:, order], rtol=1e-5)


@pytest.mark.parametrize("op", sorted(ops_with("bounded")))
def test_bounded_ones_stay_within_one(op: str) -> None:
    assert np.abs(computed(op, 10 * X)).max() <= 1 + 1e-6


@pytest.mark.parametrize("op", sorted(ops_with("no-larger", "elementwise") - {"Cast"}))
def test_none_grows_where_the_table_says_so(op: str) -> None:
    assert (np.abs(computed(op, X)) <= np.abs(X) * (1 + 1e-6)).all()


@pytest.mark.parametrize("op", sorted((ops_with("spreads-nan", "unary")) | {"Softmax"}))
def test_a_nan_is_seen_behind_what_spreads_it(op: str) -> None:
    assert np.isnan(computed(op, np.array([[1, np.nan, 2]], np.float32))).any()
