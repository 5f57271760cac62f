"""Convolution structures: Conv -> (BatchNorm) -> activation -> Conv chains, and channel Concats in front of convolutions."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompile.ir import ops
from qcompile.ir.shapes import dims, rank
from qcompile.structure.activation import Activation, find_activations
from qcompile.structure.core import Matches, Refusal, data_uses, label, once, only_user


@dataclass(frozen=True)
class ConvChain:
    """`second` alone reads `first`'s output, through the BatchNormalization and the activation (each None if absent)."""

    first: ir.Node
    batch_norm: ir.Node | None
    activation: Activation | None
    second: ir.Node


@dataclass(frozen=True)
class ConcatShortcut:
    """A Concat on the channel axis whose output `convs` read directly; `sizes[i]` channels come from `parts[i]`."""

    concat: ir.Node
    parts: tuple[ir.Value, ...]
    sizes: tuple[int | None, ...]
    convs: tuple[ir.Node, ...]


@once
def find_conv_chains(graph: ir.Graph) -> Matches[ConvChain]:
    """All pairs of adjacent convolutions with constant weights; a Conv without such a successor is refused with the reason."""
    activations = {a.input: a for a in find_activations(graph)}
    found: list[ConvChain] = []
    refused: list[Refusal] = []
    for node in graph:
        if not ops.is_op(node, *ops.CONV_OPS) or ops.weight_slot(node) is None:
            continue
        match = _chain(node, activations)
        if isinstance(match, ConvChain):
            found.append(match)
        else:
            refused.append(match)
    return Matches(tuple(found), tuple(refused))


def _chain(first: ir.Node, activations: dict[ir.Value, Activation]) -> ConvChain | Refusal:
    value, batch_norm = first.outputs[0], _batch_norm_behind(first)
    if batch_norm is not None:
        value = batch_norm.outputs[0]
    activation = activations.get(value)
    if activation is not None:
        if not {n for n, _ in data_uses(value)} <= set(activation.nodes) or value.is_graph_output():
            return Refusal(first, "its output also feeds other nodes than the activation")
        value = activation.output
    users = tuple(n for n, _ in data_uses(value))
    if value.is_graph_output() or len(users) != 1:
        return Refusal(first, f"its output feeds {len(users)} nodes" if users else "its output is a graph output")
    second = users[0]
    if not ops.is_op(second, *ops.CONV_OPS) or second.inputs[0] is not value or ops.weight_slot(second) is None:
        return Refusal(first, f"followed by {label(second)}, not by a convolution")
    return ConvChain(first, batch_norm, activation, second)


def _batch_norm_behind(conv: ir.Node) -> ir.Node | None:
    return only_user(conv.outputs[0], "BatchNormalization")


@once
def find_concat_shortcuts(graph: ir.Graph) -> Matches[ConcatShortcut]:
    """All Concats on axis 1 that at least one convolution reads directly; other channel Concats are refused."""
    found: list[ConcatShortcut] = []
    refused: list[Refusal] = []
    for node in graph:
        if not ops.is_op(node, "Concat") or not _joins_channels(node):
            continue
        convs = tuple(n for n, slot in node.outputs[0].uses() if slot == 0 and ops.is_op(n, "Conv") and ops.weight_slot(n))
        if not convs:
            refused.append(Refusal(node, "no convolution reads the joined channels directly"))
            continue
        parts = tuple(v for v in node.inputs if v is not None)
        found.append(ConcatShortcut(node, parts, tuple(_channel_count(v) for v in parts), convs))
    return Matches(tuple(found), tuple(refused))


def _joins_channels(node: ir.Node) -> bool:
    axis, known = ops.int_attr(node, "axis", 0), rank(node.outputs[0])
    if known is not None and known < 3:
        return False
    return axis == 1 or (known is not None and axis + known == 1)


def _channel_count(value: ir.Value) -> int | None:
    shape = dims(value)
    size = shape[1] if shape is not None and len(shape) > 1 else None
    return size if isinstance(size, int) else None
