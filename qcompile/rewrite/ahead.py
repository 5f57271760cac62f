"""Channels of one range in front of depthwise convolutions that nothing in front of them can give: by a Mul on the edge.

before: act -> Conv(W, group = channels)
after:  act -> Mul(1 / s) -> Conv(diag(s) W)
s = 2^k, so that both are exact; the convolution's scales, one a channel, take s for nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe.change import AffineMap, Changes
from qcompile.ir.edit import add_constant, insert_after, new_node, redirect, set_constant
from qcompile.ir.ops import is_op, weight_slot
from qcompile.rewrite.bias import by_input, groups_of, weight_array

F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Ahead:
    """A tensor and the depthwise convolutions that read it."""

    tensor: ir.Value
    convs: tuple[ir.Node, ...]


def depthwise(node: ir.Node) -> bool:
    """A Conv with a constant weight that makes each channel of one of its input's."""
    if not is_op(node, "Conv") or weight_slot(node) is None:
        return False
    weight = weight_array(node)
    return groups_of(node) == len(weight) > 1 and weight.shape[1] == 1


def tensors_ahead(graph: ir.Graph, folded: Collection[ir.Node]) -> list[Ahead]:
    """What feeds depthwise convolutions other than `folded`, in graph order."""
    readers = dict[ir.Value, list[ir.Node]]()
    for node in graph:
        value = node.inputs[0] if depthwise(node) and node not in folded else None
        if value is not None and not value.is_initializer():
            readers.setdefault(value, []).append(node)
    return [Ahead(value, tuple(convs)) for value, convs in readers.items()]


def gain_db(s: F64) -> float:
    """By how much a channel gains on the mean when the one scale of a tensor, that of its largest channel, fits them all."""
    return float(-20 * np.log10(s).mean())


def fold_ahead(graph: ir.Graph, site: Ahead, s: F64, changes: Changes) -> None:
    """Divide the channels of `site.tensor` by s [C], for its convolutions only."""
    value, first = site.tensor, weight_array(site.convs[0])
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    shape = (1, -1, *(1,) * (first.ndim - 2))
    constant = add_constant(graph, f"{value.name}_even", (1 / s).reshape(shape).astype(dtype))
    node = new_node(graph, "Mul", [value, constant], name=f"{site.convs[0].name}_even", like=value)
    insert_after(graph, value, node)
    redirect(value, node.outputs[0], [(conv, 0) for conv in site.convs])
    changes.derived[str(node.outputs[0].name)] = (str(value.name), AffineMap(s, np.zeros_like(s)))
    for conv in site.convs:
        set_constant(conv, 1, weight_array(conv) * by_input(conv, s))
