"""The heads of a network: nothing follows to hide their rounding."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.ir.ops import is_data_movement, is_op, output_channel_axis, static_shape, weight_slot
from qcompile.ir.optable import ops_with
from qcompile.structure.core import data_uses

_CARRIES = (
    ops_with("elementwise") | ops_with("movement") | ops_with("jumps") | {"LogSoftmax", "ReduceMax", "ScatterND", "Softmax"}
)
_COORDINATES = 8  # channels of a layer that moves reference points (boxes: 4 or 5); a residual stream has more


def final_heads(graph: ir.Graph) -> frozenset[ir.Node]:
    """Weighted layers from which elementwise, moving and selecting operators alone lead to graph outputs; with them the means
    of fixed points by such a layer's Softmax (the DFL of YOLO).  None if no other layer is left.

    A sum with what a layer that is no head made is a residual stream, unless it moves a few coordinates.
    """
    layers = frozenset(n for n in graph if weight_slot(n) is not None)
    means = frozenset(n for n in layers if _is_mean(n))
    last = _last(graph, layers - means)
    streams, tails = _made(graph, layers - last - means, last), _made(graph, last, frozenset())
    heads = frozenset(n for n in last | means if _ends_outside(n, means, streams, tails))
    return frozenset() if len(heads) == len(layers) else heads


def _is_mean(layer: ir.Node) -> bool:
    """One output channel, on the shares of a Softmax."""
    slot = weight_slot(layer)
    value = None if slot is None else layer.inputs[1 - slot]
    while value is not None and (node := value.producer()) is not None and is_data_movement(node):
        value = node.inputs[0]
    return value is not None and is_op(value.producer(), "Softmax") and _channels(layer) == 1


def _last(graph: ir.Graph, layers: frozenset[ir.Node]) -> frozenset[ir.Node]:
    """Those of `layers` whose outputs lead to no other."""
    leading = set[ir.Node]()
    for node in reversed(graph):
        behind = [user for value in node.outputs for user, _ in data_uses(value)]
        if any(user in layers or user in leading for user in behind):
            leading.add(node)
    return layers - leading


def _made(graph: ir.Graph, layers: frozenset[ir.Node], until: frozenset[ir.Node]) -> set[ir.Value]:
    """What `layers` made, up to the layers of `until`."""
    made = set[ir.Value]()
    for node in graph:
        if node in layers or (node not in until and any(v in made for v in node.inputs)):
            made.update(node.outputs)
    return made


def _ends_outside(layer: ir.Node, means: frozenset[ir.Node], streams: set[ir.Value], tails: set[ir.Value]) -> bool:
    reached = _reached(layer, means)
    if reached is None or _channels(layer) <= _COORDINATES:
        return reached is not None
    for node in dict.fromkeys(n for v in reached for n, _ in data_uses(v) if not is_op(n, "Concat")):
        others = [v for v in node.inputs if v not in reached]
        if any(v in streams for v in others) or (is_op(node, "Add", "Sub", "Sum") and any(v in tails for v in others)):
            return False
    return True


def _reached(layer: ir.Node, means: frozenset[ir.Node]) -> dict[ir.Value, None] | None:
    """What the layer's output is carried to; None if an operator on the way hides its rounding, or it leads nowhere."""
    stack, seen = [layer.outputs[0]], dict[ir.Value, None]()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen[value] = None
        users = [node for node, _ in data_uses(value)]
        if not all(n in means or is_op(n, *_CARRIES) for n in users):
            return None
        stack.extend(v for n in users for v in n.outputs)
    return seen if any(v.is_graph_output() for v in seen) else None


def _channels(layer: ir.Node) -> int:
    """Of the output; 0 where not known."""
    slot = weight_slot(layer)
    shape = None if slot is None else static_shape(layer.inputs[slot])
    if not shape:
        return 0
    return (shape[output_channel_axis(layer)] or 0) if len(shape) > 1 else 1
