"""Weights and biases of layers by channel, grouped convolutions included; all arithmetic in float64."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.edit import add_constant, set_constant
from qcompile.ir.ops import const_array, input_at, int_attr, is_op, output_channel_axis
from qcompile.rewrite.linear import like

F64 = NDArray[np.float64]


def weight_array(node: ir.Node) -> F64:
    """The constant weight at slot 1, as stored."""
    weight = const_array(node.inputs[1])
    assert weight is not None
    return weight.astype(np.float64)


def groups_of(node: ir.Node) -> int:
    """The groups of a convolution."""
    return int_attr(node, "group", 1)


def by_output(node: ir.Node, s: F64) -> F64:
    """s [out] shaped to multiply the weight of a Conv [O, I/g, ..], a ConvTranspose [I, O/g, ..] or a matrix."""
    weight = weight_array(node)
    if is_op(node, "ConvTranspose"):
        rows = s.reshape(groups_of(node), weight.shape[1]).repeat(len(weight) // groups_of(node), axis=0)
        return rows.reshape(*rows.shape, *(1,) * (weight.ndim - 2))
    axis = output_channel_axis(node)
    return s.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])


def by_input(node: ir.Node, s: F64) -> F64:
    """s [in] shaped to multiply the weight of a Conv [O, I/g, ..]."""
    weight = weight_array(node)
    rows = s.reshape(groups_of(node), weight.shape[1]).repeat(len(weight) // groups_of(node), axis=0)
    return rows.reshape(*rows.shape, *(1,) * (weight.ndim - 2))


def input_tops(node: ir.Node, weight: F64) -> F64:
    """The largest |W| that reads each input channel of a Conv, [in]."""
    groups = groups_of(node)
    split = np.abs(weight).reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return split.max((1, 3)).reshape(-1)


def mean_output(node: ir.Node, weight: F64, mean: F64) -> F64 | None:
    """E[output] [out] of a layer without bias for inputs of `mean` [in]; None if they do not fit.  Of a Conv without padding."""
    if is_op(node, "Conv"):
        if groups_of(node) * weight.shape[1] != mean.size:
            return None
        return (weight * by_input(node, mean)).reshape(len(weight), -1).sum(1)
    k = weight if output_channel_axis(node) == 1 else weight.T
    return mean @ k if k.shape[0] == mean.size else None


def bias_site(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Where the constant bias of a layer is read: its own slot (made if missing), or the Add behind a MatMul."""
    if is_op(node, "Conv", "ConvTranspose", "Gemm"):
        present = input_at(node, 2) is not None
        return None if present and const_array(node.inputs[2]) is None else (node, 2)
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or not is_op(uses[0][0], "Add"):
        return None
    add, slot = uses[0]
    bias = const_array(add.inputs[1 - slot])
    return (add, 1 - slot) if bias is not None and bias.ndim and bias.size == bias.shape[-1] > 1 else None


def bias_at(site: tuple[ir.Node, int], channels: int) -> F64:
    """The bias at a `bias_site` as [channels], 0 where there is none."""
    bias = const_array(input_at(*site))
    return np.zeros(channels) if bias is None else np.broadcast_to(bias.astype(np.float64).reshape(-1), (channels,))


def set_bias(graph: ir.Graph, site: tuple[ir.Node, int], bias: F64) -> None:
    """Write the bias [out] at a `bias_site`; one is made where there is none and `bias` is not 0."""
    node, slot = site
    old = const_array(input_at(node, slot))
    if old is not None:
        set_constant(node, slot, like(old, bias))
    elif bias.any():
        weight = node.inputs[1]
        assert weight is not None and weight.dtype is not None
        node.resize_inputs(slot + 1)
        made = add_constant(graph, f"{node.name}_bias", bias.astype(weight.dtype.numpy()), weight.dtype)
        node.replace_input_with(slot, made)


def shift_bias(graph: ir.Graph, site: tuple[ir.Node, int], shift: F64) -> None:
    """c' = c + shift [out] at a `bias_site`."""
    set_bias(graph, site, bias_at(site, shift.size) + shift)
