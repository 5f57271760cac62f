"""Operator facts, on graphs written in ONNX text."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile.errors import ModelError
from qcompile.ir import ops


def graph_of(body: str, **weights: tuple[int, ...]) -> ir.Graph:
    """A graph with input `x` and random float initializers of the given shapes."""
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[2,3,4] x) => (float[2,3,4] y) {{ {body} }}'
    graph = ir.from_proto(onnx.parser.parse_model(text)).graph
    for name, shape in weights.items():
        value = next(v for n in graph for v in n.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape), name=name)
        graph.register_initializer(value)
    return graph


def last(body: str, **weights: tuple[int, ...]) -> ir.Node:
    return list(graph_of(body, **weights))[-1]


def test_constants_resolve_through_identity_and_constant_nodes() -> None:
    node = last("c = Constant<value_float = 2.5>() d = Identity(c) e = Identity(w) f = Add(d, e) y = Mul(x, f)", w=(4,))
    add = node.inputs[1].producer()
    assert ops.const_scalar(add.inputs[0]) == 2.5
    assert ops.const_array(add.inputs[1]).tolist() == [0, 1, 2, 3]
    assert not ops.is_const(node.inputs[1]) and not ops.is_const(None)
    assert ops.const_scalar(add.inputs[1]) is None


def test_casts_of_constants_are_left_to_canonicalize() -> None:
    node = last("c = Cast<to = 1>(w) y = MatMul(x, c)", w=(4, 5))
    assert ops.weight_slot(node) is None


def test_const_ints_reads_scalars_and_lists() -> None:
    node = last("a = Constant<value_ints = [1, 2]>() b = Constant<value_int = 7>() y = F(a, b, x)")
    assert [ops.const_ints(v) for v in node.inputs] == [(1, 2), (7,), None]


@pytest.mark.parametrize(
    ("body", "shape", "slot", "out_axis", "in_axis", "x_axis", "y_axis"),
    [
        ("y = MatMul(x, w)", (4, 5), 1, 1, 0, -1, -1),
        ("y = MatMul(x, w)", (2, 4, 5), 1, 2, 1, -1, -1),
        ("y = MatMul(w, x)", (5, 3), 0, 0, 1, -2, -2),
        ("y = Gemm(x, w)", (4, 5), 1, 1, 0, 1, 1),
        ("y = Gemm<transB = 1>(x, w)", (5, 4), 1, 0, 1, 1, 1),
        ("y = Gemm<transA = 1>(x, w)", (4, 5), 1, 1, 0, 0, 1),
        ("y = Conv(x, w)", (5, 4, 3, 3), 1, 0, 1, 1, 1),
        ("y = ConvTranspose(x, w)", (4, 5, 3, 3), 1, 1, 0, 1, 1),
    ],
)
def test_weight_and_channel_axes(
    body: str, shape: tuple[int, ...], slot: int, out_axis: int, in_axis: int, x_axis: int, y_axis: int
) -> None:
    node = last(body, w=shape)
    assert ops.weight_slot(node) == slot
    assert (ops.output_channel_axis(node), ops.input_channel_axis(node)) == (out_axis, in_axis)
    assert (ops.activation_channel_axis(node), ops.output_activation_axis(node)) == (x_axis, y_axis)


def test_nodes_without_a_constant_weight_have_no_axes() -> None:
    node = last("y = MatMul(x, x)")
    assert ops.is_compute(node) and ops.weight_slot(node) is None
    with pytest.raises(ModelError, match="weight_slot"):
        ops.output_channel_axis(node)


def test_a_vector_is_not_a_weight() -> None:
    assert ops.weight_slot(last("y = MatMul(x, w)", w=(4,))) is None


def test_bias_slots() -> None:
    assert ops.bias_slot(last("y = Gemm(x, w)", w=(4, 5))) == 2
    assert ops.bias_slot(last("y = MatMul(x, w)", w=(4, 5))) is None


def test_movement_and_domains() -> None:
    assert ops.is_data_movement(last("y = Transpose(x)"))
    assert not ops.is_data_movement(last("y = Relu(x)"))
    graph = graph_of("y = Transpose(x)")
    node = graph[0]
    node.domain = "my.ops"
    assert not ops.is_data_movement(node) and not ops.is_op(node, "Transpose")


def test_attributes() -> None:
    node = last('y = Op<a = 3, b = [1, 2], c = 0.5, d = "s">(x)')
    assert (ops.int_attr(node, "a", 0), ops.ints_attr(node, "b"), ops.float_attr(node, "c", 0.0)) == (3, (1, 2), 0.5)
    assert (ops.str_attr(node, "d", ""), ops.str_attr(node, "z", "t"), ops.ints_attr(node, "z")) == ("s", "t", None)
    assert ops.input_at(node, 3) is None


def test_static_shape() -> None:
    node = last("y = MatMul(x, w)", w=(4, 5))
    assert [ops.static_shape(v) for v in (*node.inputs, None)] == [(2, 3, 4), (4, 5), None]
