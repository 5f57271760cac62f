"""Forms that exporters write, one tiny graph each: norms, linears, activations, and the reasons for refusals."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from qcompile import structure as match
from qcompile.passes.equivalent.split_shortcut import find_shortcuts

C = 6
SHAPES = {"g": (C,), "b": (C,), "w": (C, C), "c": (C,), "w2": (C, C), "wt": (C, C), "w3": (1, C, C), "wh": (C // 2, C)}
SHAPES |= {"half": (), "vec": (1, 1, C)}


def parse(body: str, output: str = "y", opset: int = 20, x: str = f"2,3,{C}") -> ir.Graph:
    """A graph from ONNX text; the names of SHAPES are float initializers."""
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> t (float[{x}] x) => (float[A] {output}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    used = {name for node in proto.graph.node for name in node.input}
    rng = np.random.default_rng(0)
    for name in sorted(used & SHAPES.keys()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(SHAPES[name]).astype(np.float32), name))
    proto.graph.output[0].ClearField("type")
    model = ir.from_proto(proto)
    for i, node in enumerate(model.graph):
        node.name = f"n{i}"
    ShapeInferencePass()(model)
    return model.graph


LAYER = "a = ReduceMean<axes = [-1]>(x) d = Sub(x, a) two = Constant<value_float = 2.0>() e = Constant<value_float = 0.00001>() "
VARIANCE = "s = Pow(d, two) v = ReduceMean<axes = [-1]>(s) ve = Add(v, e) r = Sqrt(ve) "
NORMS = {
    "pow-div": (LAYER + VARIANCE + "h = Div(d, r) m = Mul(h, g) y = Add(m, b)", "layer"),
    "affine-first": (LAYER + VARIANCE + "h = Div(d, r) m = Mul(g, h) y = Add(b, m)", "layer"),
    "mul-square": (LAYER + VARIANCE.replace("Pow(d, two)", "Mul(d, d)") + "h = Div(d, r) m = Mul(h, g) y = Add(m, b)", "layer"),
    "reciprocal": (LAYER + VARIANCE + "q = Reciprocal(r) h = Mul(d, q) m = Mul(h, g) y = Add(m, b)", "layer"),
    "one-over": (LAYER + VARIANCE + "one = Constant<value_float = 1.0>() q = Div(one, r) h = Mul(q, d) "
                 "m = Mul(h, g) y = Add(m, b)", "layer"),
    "power": (LAYER + VARIANCE.replace("Sqrt(ve)", "Pow(ve, p)").replace("s = Pow", "p = Constant<value_float = -0.5>() s = Pow")
              + "h = Mul(d, r) m = Mul(h, g) y = Add(m, b)", "layer"),
    "twice-centred": (LAYER + VARIANCE + "d2 = Sub(x, a) h = Div(d2, r) m = Mul(h, g) y = Add(m, b)", "layer"),
    "positive-axis": ((LAYER + VARIANCE).replace("[-1]", "[2]") + "h = Div(d, r) m = Mul(h, g) y = Add(m, b)", "layer"),
    "identity-gamma": (LAYER + VARIANCE + "i = Identity(g) h = Div(d, r) m = Mul(h, i) y = Add(m, b)", "layer"),
    "wide-gamma": (LAYER + VARIANCE + "h = Div(d, r) m = Mul(h, vec) y = Add(m, b)", "layer"),
    "rms": (LAYER + VARIANCE.replace("Pow(d", "Pow(x") + "h = Div(x, r) y = Mul(h, g)", "rms"),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_decomposed_norms(name: str) -> None:
    body, kind = NORMS[name]
    graph = parse(body, opset=17)
    (norm,) = match.find_norms(graph).found
    assert (norm.kind, norm.input.name, norm.output.name, norm.channels, norm.axis) == (kind, "x", "y", C, -1)
    assert norm.gamma_site is not None and (norm.beta_site is not None) == (kind == "layer")
    assert norm.eps == pytest.approx(1e-5)


def test_axes_as_an_input() -> None:
    body = "ax = Constant<value_ints = [-1]>() " + (LAYER + VARIANCE).replace("<axes = [-1]>(x)", "(x, ax)").replace(
        "<axes = [-1]>(s)", "(s, ax)"
    )
    (norm,) = match.find_norms(parse(body + "h = Div(d, r) m = Mul(h, g) y = Add(m, b)")).found
    assert norm.kind == "layer"


def test_a_norm_without_affine_part_has_no_sites() -> None:
    (norm,) = match.find_norms(parse(LAYER + VARIANCE + "y = Div(d, r)", opset=17)).found
    assert (norm.gamma_site, norm.beta_site, norm.channels) == (None, None, C)


def test_layer_normalization_without_bias_names_the_empty_slot() -> None:
    (norm,) = match.find_norms(parse("y = LayerNormalization(x, g)")).found
    assert norm.beta is None and norm.beta_site == (norm.node, 2)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("s = Relu(x) y = LayerNormalization(x, s)", "its scale is computed, not constant"),
        ("y = LayerNormalization<axis = 1>(x, g)", "normalises over several axes"),
        ((LAYER + VARIANCE).replace("[-1]", "[1]") + "y = Div(d, r)", "normalises over another axis than the last"),
        (LAYER + VARIANCE + "y = Div(x, r)", "nothing divides its input by this root"),
    ],
)
def test_norms_refused(body: str, reason: str) -> None:
    norms = match.find_norms(parse(body, opset=17))
    assert not norms.found and reason in norms.refused[0].reason


NORM = "n = LayerNormalization(x, g, b) "


@pytest.mark.parametrize(
    ("body", "kind", "slot"),
    [
        ("m = MatMul(x, w) y = Add(m, c)", "matmul", 1),
        ("m = MatMul(x, w) y = Add(c, m)", "matmul", 0),
        ("m = MatMul(x, w) y = Add(vec, m)", "matmul", 0),
        ("y = MatMul(x, w)", "matmul", None),
        ("y = Gemm<transB = 1>(x, wt, c)", "gemm", 2),
        ("y = Gemm(x, w)", "gemm", 2),
        ("i = Identity(w) y = MatMul(x, i)", "matmul", None),
        ("m = MatMul(x, w) y = Add(m, x)", "matmul", None),
        ("m = MatMul(x, w) y = Add(m, half)", "matmul", None),
        ("m = MatMul(x, w) q = Shape(m) y = Add(m, c)", "matmul", 1),
    ],
)
def test_linears(body: str, kind: str, slot: int | None) -> None:
    (linear,) = match.find_linears(parse(body)).found
    assert (linear.kind, linear.bias_slot, linear.in_channels, linear.out_channels) == (kind, slot, C, C)
    assert linear.pointwise and linear.input.name == "x"
    assert (linear.output.name == "m") == ("m =" in body and slot is None)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = MatMul(x, w3)", "its weight is batched"),
        ("y = MatMul(w, x)", "its weight is the first operand"),
        ("k = Cast<to = 1>(w) y = MatMul(x, k)", "its weight is made by Cast n0: run canonicalize"),
        ("y = Gemm<alpha = 0.5>(x, w)", "alpha or beta is not 1"),
        ("y = Gemm<transA = 1>(x, w)", "transA"),
        ("k = Relu(x) y = Gemm(x, w, k)", "its addend is not a constant bias vector"),
    ],
)
def test_linears_refused(body: str, reason: str) -> None:
    linears = match.find_linears(parse(body))
    assert not linears.found and reason in linears.refused[0].reason


MOVES_OK = {
    "direct": "y = MatMul(n, w)",
    "two linears": "k = MatMul(n, w) l = MatMul(n, w2) y = Add(k, l)",
    "window": f"s = Constant<value_ints = [6, 1, {C}]>() r = Reshape(n, s) y = MatMul(r, w)",
    "transpose": "t = Transpose<perm = [1, 0, 2]>(n) y = MatMul(t, w)",
    "token": "i = Constant<value_int = 0>() t = Gather<axis = 1>(n, i) y = Gemm(t, w, c)",
    "roll": "z = Constant<value_ints = [0]>() o = Constant<value_ints = [1]>() e = Constant<value_ints = [99]>() "
    "f = Slice(n, o, e, o) h = Slice(n, z, o, o) q = Concat<axis = 1>(f, h) y = MatMul(q, w)",
    "dropout": "d = Dropout(n) y = MatMul(d, w)",
    "mean pool": "a = Constant<value_ints = [1]>() p = ReduceMean<keepdims = 0>(n, a) y = Gemm(p, w, c)",
    "shape reader": "s = Shape(n) r = Reshape(n, s) y = MatMul(r, w)",
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES_OK)
def test_legal_paths(name: str) -> None:
    (site,) = match.find_norm_to_linears(parse(NORM + MOVES_OK[name])).found
    assert site.shift_ok and len(site.linears) == (2 if name == "two linears" else 1)


PADDED = "p = Constant<value_ints = [0, 0, 0, 0, 1, 0]>() q = Pad{}(n, p) y = MatMul(q, w)"


@pytest.mark.parametrize(("mode", "refusal"), [("", "Pad n2 writes a constant between the channels"), ('<mode = "edge">', None)])
def test_zero_padding_forbids_only_the_shift(mode: str, refusal: str | None) -> None:
    (site,) = match.find_norm_to_linears(parse(NORM + PADDED.format(mode))).found
    assert site.shift_refusal == refusal


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("k = MatMul(n, w) y = Add(n, k)", "feeds the residual Add n2 (post-norm)"),
        ("k = Relu(n) y = MatMul(k, w)", "consumer Relu n1 is not a linear"),
        ("y = MatMul(n, n)", "consumer MatMul n1 is not a linear"),
        ("y = MatMul(n, w3)", "consumer MatMul n1: its weight is batched"),
        ("t = Transpose<perm = [0, 2, 1]>(n) y = MatMul(t, x)", "consumer MatMul n2 is not a linear"),
        ("s = Constant<value_ints = [2, 9, 2]>() y = Reshape(n, s)", "norm output is a graph output"),
        ("q = Concat<axis = 1>(n, x) y = MatMul(q, w)", "Concat n1 mixes in other values"),
        ("q = Concat<axis = 2>(n, n) y = Relu(q)", "channel axis lost in Concat n1"),
        ("s = Shape(x) y = Relu(x)", "norm output is unused"),
        ("p = Constant<value_ints = [0, 0, 1, 0, 0, 0]>() q = Pad(n, p) y = Relu(q)", "pads the channels"),
        ("p = Constant<value_ints = [2, 1, 0]>() q = Gather<axis = 2>(n, p) y = Relu(q)", "gathers channels"),
        ("k = Cast<to = 7>(n) y = Identity(k)", "cast to integers"),
        ("a = Constant<value_ints = [2]>() k = ReduceMean(n, a) y = Relu(k)", "averages over the channels"),
        ("k = Reshape(n, half) y = Relu(k)", "channel axis lost in Reshape n1"),
    ],
)
def test_illegal_folds(body: str, reason: str) -> None:
    folds = match.find_norm_to_linears(parse(NORM + body))
    assert not folds.found and reason in folds.refused[0].reason


def test_a_reader_inside_a_subgraph_is_refused() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> t (float[2,3,6] x, bool k) => (float[2,3,6] y) {
        n = LayerNormalization(x, g, b)
        y = If<then_branch = a () => (float[2,3,6] p) { p = Relu(n) },
               else_branch = e () => (float[2,3,6] q) { q = Identity(n) }>(k) }"""
    proto = onnx.parser.parse_model(text)
    for name in "gb":
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(C, np.float32), name))
    folds = match.find_norm_to_linears(ir.from_proto(proto).graph)
    assert not folds.found and "reads it inside a subgraph" in folds.refused[0].reason


def test_a_norm_of_unknown_rank_still_folds_directly() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> t (float[2,3,6] x) => (float[2,3,6] y) '
        "{ n = F(x) h = LayerNormalization(n, g) y = MatMul(h, w) }"
    )
    for name, shape in (("g", (C,)), ("w", (C, C))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    assert len(match.find_norm_to_linears(ir.from_proto(proto).graph)) == 1


K = "k{0} = Constant<value_float = {1}>() "
ERF = K.format(1, 1.4142135) + K.format(2, 1.0) + K.format(3, 0.5) + "d = Div(x, k1) e = Erf(d) a = Add(e, k2) "
TANH = K.format(1, 3.0) + K.format(2, 0.044715) + K.format(3, 0.7978845608) + K.format(4, 1.0) + K.format(5, 0.5)
CUBIC = "p = Pow(x, k1) q = Mul(p, k2) s = Add(x, q) u = Mul(s, k3) t = Tanh(u) a = Add(t, k4) "
ACTIVATIONS = {
    "erf-torchscript": (ERF + "m = Mul(x, a) y = Mul(m, k3)", "gelu-erf"),
    "erf-dynamo": (ERF + "m = Mul(k3, a) y = Mul(x, m)", "gelu-erf"),
    "erf-half-first": (ERF + "m = Mul(x, k3) y = Mul(m, a)", "gelu-erf"),
    "erf-inverse": (ERF.replace("Div(x, k1)", "Mul(x, r)").replace("d =", "r = Constant<value_float = 0.70710678>() d =")
                    + "m = Mul(x, a) y = Mul(m, k3)", "gelu-erf"),
    "erf-halved": (ERF + "two = Constant<value_float = 2.0>() m = Mul(x, a) y = Div(m, two)", "gelu-erf"),
    "tanh": (TANH + CUBIC + "m = Mul(x, k5) y = Mul(m, a)", "gelu-tanh"),
    "tanh-late-half": (TANH + CUBIC + "m = Mul(k5, a) y = Mul(x, m)", "gelu-tanh"),
    "tanh-factored": (TANH + "x2 = Mul(x, x) f = Mul(x2, k2) l = Add(f, k4) xl = Mul(x, l) u = Mul(xl, k3) t = Tanh(u) "
                      "a = Add(t, k4) h = Mul(x, k5) y = Mul(h, a)", "gelu-tanh"),
    "gelu": ("y = Gelu(x)", "gelu-erf"),
    "gelu-tanh": ('y = Gelu<approximate = "tanh">(x)', "gelu-tanh"),
    "silu": ("s = Sigmoid(x) y = Mul(x, s)", "silu"),
    "quick": ("k = Constant<value_float = 1.702>() u = Mul(x, k) s = Sigmoid(u) y = Mul(s, x)", "quick-gelu"),
    "hard-swish": ("s = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x) y = Mul(x, s)", "hard-swish"),
    "mish": ("p = Softplus(x) t = Tanh(p) y = Mul(x, t)", "mish"),
    "relu": ("y = Relu(x)", "relu"),
    "relu6": (K.format(1, 0.0) + K.format(2, 6.0) + "y = Clip(x, k1, k2)", "relu6"),
    "sigmoid": ("y = Sigmoid(x)", "sigmoid"),
    "other-factor": (K.format(1, 1.5) + "u = Mul(x, k1) y = Tanh(u)", "tanh"),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    body, kind = ACTIVATIONS[name]
    (activation,) = match.find_activations(parse(body)).found
    assert (activation.kind, activation.output.name) == (kind, "y")
    assert activation.input.name == ("u" if name == "other-factor" else "x")


FC1 = "f = MatMul(x, w) h = Add(f, c) "


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = Gelu(h) k = MatMul(a, w2) y = Add(k, a)", "its output feeds 2 nodes"),
        ("a = Gelu(h) y = Identity(a)", "its output is a graph output"),
        ("a = Gelu(h) y = Mul(a, x)", "consumer Mul n3 is not a linear"),
    ],
)
def test_mlps_refused(body: str, reason: str) -> None:
    mlps = match.find_mlps(parse(FC1 + body))
    assert not mlps.found and reason in mlps.refused[0].reason


def test_packed_gate_and_up_projection() -> None:
    halves = "f = MatMul(x, w) a, u = Split<axis = -1, num_outputs = 2>(f) "
    (mlp,) = match.find_mlps(parse(halves + "s = Sigmoid(a) z = Mul(a, s) h = Mul(z, u) y = MatMul(h, wh)")).found
    assert mlp.kind == "swiglu" and mlp.up is mlp.fc1 and mlp.hidden.name == "h"


def test_convolutions() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> t (float[1,3,8,8] x) => (float[1,4,8,8] y) '
        "{ h = Conv<pads = [1,1,1,1]>(x, w1) b = BatchNormalization(h, s, s, s, s) r = Relu(b) "
        "c = Concat<axis = 1>(r, r) y = Conv(c, w2) }"
    )
    for name, shape in (("w1", (2, 3, 3, 3)), ("w2", (4, 4, 1, 1)), ("s", (2,))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(proto)).graph
    (shortcut,) = find_shortcuts(graph).found
    assert shortcut.sizes == (2, 2) and shortcut.parts is not None
    chains = match.find_conv_chains(graph)
    assert [r.reason for r in chains.refused] == ["its output feeds 2 nodes", "its output is a graph output"]
    assert [linear.padded for linear in match.find_linears(graph)] == [True, False]
