"""Convolution structures: Conv -> (BatchNorm) -> activation -> Conv chains."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompile.ir import ops
from qcompile.structure.activation import Activation, find_activations
from qcompile.structure.core import Matches, Refusal, data_uses, label, once, only_user, sorted_out


@dataclass(frozen=True)
class ConvChain:
    """`second` alone reads `first`'s output, through the BatchNormalization and the activation (each None if absent)."""

    first: ir.Node
    batch_norm: ir.Node | None
    activation: Activation | None
    second: ir.Node


@once
def find_conv_chains(graph: ir.Graph) -> Matches[ConvChain]:
    """All pairs of adjacent convolutions with constant weights; a Conv without such a successor is refused with the reason."""
    activations = {a.input: a for a in find_activations(graph)}
    convs = (n for n in graph if ops.is_op(n, *ops.CONV_OPS) and ops.weight_slot(n) is not None)
    return sorted_out(_chain(node, activations) for node in convs)


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
