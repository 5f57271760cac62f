from __future__ import annotations

import pytest
from onnx import parser

from qcompile.ir.jumps import Nature, natures, random_nodes
from qcompile.ir.model import Model
from qcompile.ir.optable import ops_with


def of(body: str, output: str = "float[N,4] y", constants: str = "") -> Nature:
    text = f"""<ir_version: 9, opset_import: ["" : 17]> g (float[N,4] x, int64[N,4] ids) => ({output})
    <float[4,4] w = {{{", ".join("1" for _ in range(16))}}}, int64[1] k = {{2}}, float half = {{0.5}} {constants}>
    {{ h = MatMul(x, w) {body} }}"""
    (found,) = natures(Model.from_proto(parser.parse_model(text)).graph)
    return found


@pytest.mark.parametrize(
    ("body", "made"),
    [
        ("y = ArgMax <axis = 1, keepdims = 1> (h)", "ArgMax"),
        ("v, y = TopK(h, k)", "TopK"),
        ("y = Greater(h, half)", "Greater"),
        ("y = Cast <to = 7> (h)", "Cast"),
        ("i = ArgMax <axis = 1> (h) y = Cast <to = 1> (i)", "ArgMax"),
        ("b = Greater(h, half) c = Cast <to = 1> (b) y = Mul(c, half)", "Greater"),
        ("y = Floor(h)", "Floor"),
        ("y = NonZero(h)", "NonZero"),
    ],
)
def test_what_consists_of_jumps(body: str, made: str) -> None:
    found = of(body)
    assert found.made == made and not found.smooth and not found.behind


@pytest.mark.parametrize(
    "body",
    [
        "y = Relu(h)",
        "y, i = TopK(h, k)",
        "b = Greater(h, half) y = Where(b, h, x)",
        "b = IsNaN(h) y = Where(b, half, h)",
        "b = Greater(h, half) c = Cast <to = 1> (b) y = Mul(c, h)",
        "q = Cast <to = 10> (h) y = Cast <to = 1> (q)",
        "i = Cast <to = 1> (ids) l = Log(i) j = Cast <to = 7> (l) y = Cast <to = 1> (j)",
        "b = Greater(x, half) c = Cast <to = 1> (b) y = Mul(c, h)",
        "s = Shape(h) y = Cast <to = 1> (s)",
        "y = Identity(ids)",
    ],
)
def test_what_a_small_error_moves_a_little(body: str) -> None:
    assert of(body).smooth


@pytest.mark.parametrize(
    "body",
    [
        "v, i = TopK(h, k) y = GatherElements <axis = 1> (h, i)",
        "i = ArgMax <axis = 1, keepdims = 0> (h) g = Gather(w, i) y = MatMul(g, w)",
        "v, i = TopK(h, k) g = GatherElements <axis = 1> (h, i) t = Tanh(g) y = Add(t, half)",
    ],
)
def test_what_a_jump_has_chosen(body: str) -> None:
    found = of(body)
    assert found.behind in ("TopK", "ArgMax") and not found.made and not found.smooth


@pytest.mark.parametrize("op", sorted(ops_with("random")))
def test_randomness_spreads(op: str) -> None:
    make = f"n = {op} <shape = [1, 4]> ()" if op in ("RandomNormal", "RandomUniform") else f"n = {op} (h)"
    found = of(f"{make} c = Cast <to = 1> (n) y = Add(h, c)")
    assert found.random == op and not found.smooth


def test_dropout_is_random_in_training_only() -> None:
    training = of("y = Dropout(h, half, on)", constants=", bool on = {1}")
    assert training.random == "Dropout" and of("y = Dropout(h)").smooth
    assert of("y = Dropout(h, half, on)", constants=", bool on = {0}").smooth


def test_shapes_of_random_values_are_no_randomness() -> None:
    assert of("n = RandomNormalLike(h) s = Shape(n) y = Reshape(h, s)").smooth


def test_branches_that_a_jump_chooses() -> None:
    found = of(
        "m = ReduceMax <keepdims = 0> (h) b = Greater(m, half) "
        "y = If (b) <then_branch = a () => (float[N,4] p) { p = Relu(h) }, else_branch = c () => (float[N,4] q) { q = Tanh(h) }>"
    )
    assert found.behind == "Greater"


def test_bodies_are_looked_into() -> None:
    branches = "then_branch = a () => (int64 p) { p = ArgMax(h) }, else_branch = c () => (int64 q) { q = ArgMax(h) }"
    text = f"y = If (on) <{branches}>"
    assert of(text, "int64[1,4] y", ", bool on = {1}").made == "ArgMax"


def test_random_nodes_are_named() -> None:
    text = """<ir_version: 9, opset_import: ["" : 17]> g (float[N,4] x) => (float[N,4] y)
    { n = RandomNormalLike(x) y = Add(x, n) }"""
    assert [n.op_type for n in random_nodes(Model.from_proto(parser.parse_model(text)).graph)] == ["RandomNormalLike"]
