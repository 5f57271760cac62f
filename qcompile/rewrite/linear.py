"""Verbs that fold a map of channels into linear layers and constants; all arithmetic in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.edit import add_constant, new_node, set_constant, splice_after
from qcompile.ir.notes import forget_channel_stats, move_channel_stats
from qcompile.ir.ops import const_array
from qcompile.structure.linear import Linear, match_linear

F64 = NDArray[np.float64]
Change = Callable[[F64], F64]


def fresh(linear: Linear) -> Linear:
    """The linear as it is now: an earlier fold may have replaced its weight or added a bias."""
    now = match_linear(linear.node)
    assert isinstance(now, Linear)
    return now


def weight_of(linear: Linear) -> F64:
    """The weight as [in, out, rest] in float64, rest the kernel's elements (1 for a matrix)."""
    weight = const_array(fresh(linear).weight)
    assert weight is not None
    moved = np.moveaxis(weight.astype(np.float64), (linear.in_axis, linear.out_axis), (0, 1))
    return moved.reshape(*moved.shape[:2], -1)


def map_outputs(linear: Linear, m: F64) -> None:
    """y' = y m: W' = W m and b' = b m for m [out, out]."""
    _edit_outputs(linear, lambda y: y @ m)
    forget_channel_stats(linear.output)


def scale_outputs(linear: Linear, s: F64) -> None:
    """y' = y s for s [out]: the columns of W and b, times s."""
    _edit_outputs(linear, lambda y: y * s)
    move_channel_stats(linear.output, scale=s)


def divide_outputs(linear: Linear, s: F64) -> None:
    """y' = y / s for s [out]."""
    _edit_outputs(linear, lambda y: y / s)
    move_channel_stats(linear.output, scale=1 / s)


def shift_outputs(graph: ir.Graph, linear: Linear, t: F64) -> None:
    """y' = y + t for t [out]."""
    add_to_bias(graph, linear, t)
    move_channel_stats(linear.output, shift=t)


def map_inputs(linear: Linear, m: F64) -> None:
    """W' = m W for m [in, in]: undoes x' = x m^-1."""
    _edit_weight(fresh(linear), linear.in_axis, lambda w: w @ m.T)


def scale_inputs(linear: Linear, s: F64) -> None:
    """W' = diag(s) W for s [in]: undoes x' = x / s."""
    _edit_weight(fresh(linear), linear.in_axis, lambda w: w * s)


def absorb_shift(graph: ir.Graph, linear: Linear, t: F64) -> set[str]:
    """b' = b + t W for t [in]: undoes x' = x - t; returns the tensor in front of the bias, which moves, if there is one."""
    add_to_bias(graph, linear, t @ weight_of(linear).sum(2))
    product = linear.node.outputs[0]
    return {str(product.name)} if fresh(linear).output is not product else set[str]()


def _edit_outputs(linear: Linear, change: Change) -> None:
    linear = fresh(linear)
    _edit_weight(linear, linear.out_axis, change)
    bias = const_array(linear.bias)
    if bias is not None and linear.bias_node is not None and linear.bias_slot is not None:
        wide = np.broadcast_to(bias.astype(np.float64).reshape(-1), linear.out_channels)
        set_constant(linear.bias_node, linear.bias_slot, like(bias, change(wide)))


def _edit_weight(linear: Linear, axis: int, change: Change) -> None:
    weight = const_array(linear.weight)
    assert weight is not None
    set_constant(linear.node, linear.weight_slot, _along(weight, axis, change))


def map_constant(node: ir.Node, slot: int, axis: int, m: F64) -> None:
    """c' = c m along `axis` (counted from the right) of the constant at `slot` (spread first where it is broadcast)."""
    array = const_array(node.inputs[slot])
    assert array is not None
    wide = array.astype(np.float64).reshape((1,) * max(0, -axis - array.ndim) + array.shape)
    if wide.shape[axis] != len(m):
        wide = np.repeat(wide, len(m), axis)
    set_constant(node, slot, _along(wide, axis, lambda c: c @ m))


def _along(array: NDArray[Any], axis: int, change: Change) -> F64:
    """`change` on the vectors along `axis`, in float64."""
    return np.moveaxis(change(np.moveaxis(array.astype(np.float64), axis, -1)), -1, axis)


def like(old: NDArray[Any], new: F64) -> F64:
    """`new` in the shape of `old` where the sizes agree."""
    return new.reshape(old.shape) if old.size == new.size else new


def add_to_bias(graph: ir.Graph, linear: Linear, extra: F64) -> None:
    """b' = b + extra [out]; a bias is made where there is none."""
    bias = const_array(linear.bias)
    if bias is not None and linear.bias_node is not None and linear.bias_slot is not None:
        wide = np.broadcast_to(bias.astype(np.float64).reshape(-1), extra.shape) + extra
        set_constant(linear.bias_node, linear.bias_slot, like(bias, wide))
        return
    weight = linear.weight.dtype
    dtype = weight.numpy() if weight is not None else np.dtype(np.float32)
    if linear.kind == "matmul" and linear.output.shape is not None:
        # A bias of the output's rank keeps ONNX Runtime from turning MatMul + Add into a Gemm (see bias-rank).
        extra = extra.reshape((1,) * (len(linear.output.shape) - 1) + (-1,))
    constant = add_constant(graph, f"{linear.node.name}_bias", extra.astype(dtype))
    if linear.kind == "matmul":
        add = new_node(graph, "Add", [linear.output, constant], name=f"{linear.node.name}_bias_add", like=linear.output)
        splice_after(graph, linear.output, add)
        return
    linear.node.resize_inputs(3)
    linear.node.replace_input_with(2, constant)
