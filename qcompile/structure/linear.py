"""Linear layers: MatMul (+ Add), Gemm and ungrouped Conv with a constant weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from qcompile.ir import ops
from qcompile.structure.core import Matches, Refusal, is_channel_vector, label, once, only_user, other_input, sorted_out

LinearKind = Literal["matmul", "gemm", "conv"]
_FOLDABLE = ("Cast", "Transpose", "DequantizeLinear", "Reshape", "Mul")


@dataclass(frozen=True)
class Linear:
    """y = x W + b, the sum over the input-channel axis of a constant weight.

    `weight` is the value read at `weight_slot` of `node` (through Identity it may differ from the initializer).  The bias is
    read at `bias_slot` of `bias_node`: a separate Add for MatMul (None without one), the node itself for Gemm and Conv (`bias`
    is None when the slot is empty).  `output` is the value behind the bias.  `padded`: a Conv that reads zeros past the border.
    """

    kind: LinearKind
    node: ir.Node
    weight: ir.Value
    weight_slot: int
    in_axis: int
    out_axis: int
    bias_node: ir.Node | None
    bias: ir.Value | None
    bias_slot: int | None
    input: ir.Value
    output: ir.Value
    padded: bool = False

    @property
    def in_channels(self) -> int:
        """Number of input channels."""
        return _size(self.weight, self.in_axis)

    @property
    def out_channels(self) -> int:
        """Number of output channels."""
        return _size(self.weight, self.out_axis)

    @property
    def pointwise(self) -> bool:
        """True for MatMul, Gemm and a 1x1 Conv."""
        return all(size == 1 for size in (ops.static_shape(self.weight) or ())[2:])

    @property
    def input_slot(self) -> int:
        """Slot of the activation."""
        return 1 - self.weight_slot

    @property
    def channel_axis(self) -> int:
        """Axis of the channels in the input and in the output: -1, or 1 for a Conv."""
        return 1 if self.kind == "conv" else -1


def _size(value: ir.Value, axis: int) -> int:
    shape = ops.static_shape(value)
    assert shape is not None
    return shape[axis] or 0


def match_linear(node: ir.Node) -> Linear | Refusal | None:
    """The linear layer computed by `node`, why it cannot be one, or None if it is no GEMM or convolution over a weight."""
    if not ops.is_compute(node):
        return None
    if ops.weight_slot(node) is None:
        source = _folded_later(node)
        return None if source is None else Refusal(node, f"its weight is made by {label(source)}: run canonicalize")
    match node.op_type:
        case "MatMul":
            return _matmul(node)
        case "Gemm":
            return _gemm(node)
        case "Conv":
            return _conv(node)
        case _:
            return Refusal(node, f"{node.op_type} is not a linear")


def _folded_later(node: ir.Node) -> ir.Node | None:
    for value in node.inputs[: 1 + (len(node.inputs) > 1)]:
        producer = None if value is None else value.producer()
        if producer is not None and ops.is_op(producer, *_FOLDABLE) and _reads_constants(producer):
            return producer
    return None


def _reads_constants(node: ir.Node) -> bool:
    return all(value is None or ops.is_const(value) for value in node.inputs)


def _matmul(node: ir.Node) -> Linear | Refusal:
    if ops.weight_slot(node) == 0:
        return Refusal(node, "its weight is the first operand")
    weight, x = node.inputs[1], node.inputs[0]
    assert weight is not None and x is not None
    shape = ops.static_shape(weight)
    if shape is None or len(shape) != 2:
        return Refusal(node, "its weight is batched")
    add = only_user(node.outputs[0], "Add")
    bias = None if add is None else other_input(add, node.outputs[0])
    if add is None or not is_channel_vector(bias, shape[1]):
        return Linear("matmul", node, weight, 1, 0, 1, None, None, None, x, node.outputs[0])
    slot = 1 if add.inputs[1] is bias else 0
    return Linear("matmul", node, weight, 1, 0, 1, add, bias, slot, x, add.outputs[0])


def _gemm(node: ir.Node) -> Linear | Refusal:
    weight, x, bias = node.inputs[1], node.inputs[0], ops.input_at(node, 2)
    assert weight is not None and x is not None
    if ops.int_attr(node, "transA", 0):
        return Refusal(node, "its activation is transposed (transA)")
    if ops.float_attr(node, "alpha", 1.0) != 1.0 or ops.float_attr(node, "beta", 1.0) != 1.0:
        return Refusal(node, "alpha or beta is not 1: run canonicalize")
    if bias is not None and not is_channel_vector(bias):
        return Refusal(node, "its addend is not a constant bias vector")
    axes = (ops.input_channel_axis(node), ops.output_channel_axis(node))
    return Linear("gemm", node, weight, 1, *axes, node, bias, 2, x, node.outputs[0])


def _conv(node: ir.Node) -> Linear | Refusal:
    weight, x, bias = node.inputs[1], node.inputs[0], ops.input_at(node, 2)
    assert weight is not None and x is not None
    if ops.int_attr(node, "group", 1) != 1:
        return Refusal(node, "grouped convolution")
    if bias is not None and not is_channel_vector(bias):
        return Refusal(node, "its bias is not constant")
    return Linear("conv", node, weight, 1, 1, 0, node, bias, 2, x, node.outputs[0], padded=ops.pads_zeros(node))


@once
def find_linears(graph: ir.Graph) -> Matches[Linear]:
    """All linear layers of the main graph, in graph order."""
    return sorted_out(match_linear(node) for node in graph)


@once
def linears_by_output(graph: ir.Graph) -> dict[ir.Value, Linear]:
    """Every linear under its output value (behind the bias)."""
    return {linear.output: linear for linear in find_linears(graph)}
