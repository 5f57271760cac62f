"""Make the batch axis of a model that was exported with batch 1 dynamic, as TensorRT profiles need it.

    qcompile model.onnx --passes "tools/surgeries/dynamic_batch.py:dynamic_batch,repq,smooth"

Exporters bake the batch into Reshape targets, Expand shapes and the class token.  Batch must be the first axis
throughout; the function on batch 1 stays the same, so qcompile verifies it.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from qcompile.ir.surgeon import surgery

BATCH = "batch"


@surgery(kind="equivalent")
def dynamic_batch(graph: gs.Graph) -> None:
    """Name axis 0 of every input of shape [1, ...] and let everything behind it follow.

    Raises:
        ValueError: no input has batch 1, or a Reshape's target cannot be told from the shapes in the file.
    """
    inputs = [x for x in graph.inputs if x.shape and x.shape[0] == 1]
    if not inputs:
        raise ValueError("no input has a fixed batch of 1; the model may already be dynamic")
    for node in _behind(inputs):
        _free(graph, node, inputs[0])
    for tensor in [t for node in _behind(inputs) for t in node.outputs]:
        _forget_batch(tensor, is_output=any(tensor is out for out in graph.outputs))
    for x in inputs:
        x.shape = [BATCH, *x.shape[1:]]


def _behind(inputs: list[gs.Variable]) -> list[gs.Node]:
    """Nodes that depend on the inputs, each once; Shape ends the walk (it is dynamic already)."""
    found: dict[int, gs.Node] = {}
    stack = list(inputs)
    while stack:
        for node in stack.pop().outputs:
            if id(node) not in found and node.op != "Shape":
                found[id(node)] = node
                stack.extend(node.outputs)
    return list(found.values())


def _free(graph: gs.Graph, node: gs.Node, source: gs.Variable) -> None:
    if node.op == "Reshape" and isinstance(node.inputs[1], gs.Constant):
        _free_reshape(node)
    if node.op == "Expand" and isinstance(node.inputs[1], gs.Constant) and int(node.inputs[1].values[0]) == 1:
        node.inputs[1] = _batched_shape(graph, node.name, node.inputs[1].values, source)
    if node.op == "Concat" and node.attrs["axis"] != 0:
        _repeat_constants(graph, node, source)


def _free_reshape(node: gs.Node) -> None:
    """Target [1, a, b] becomes [0, a, b] (copy) or [-1, a, b] where the batch was merged or split."""
    data, target = node.inputs[0], node.inputs[1]
    shape = np.array(target.values)
    if not shape.size or shape[0] in (-1, 0):
        return
    if -1 not in shape[1:]:
        shape[0] = -1
    elif data.shape and data.shape[0] in (1, BATCH) and shape[0] == 1:
        shape[0] = 0
    else:
        raise ValueError(f"Reshape {node.name!r} to {shape.tolist()}: its batch is unknown; infer the shapes first")
    node.inputs[1] = gs.Constant(f"{node.name}_dynamic", shape)


def _repeat_constants(graph: gs.Graph, node: gs.Node, source: gs.Variable) -> None:
    """A class token [1, 1, C] beside a batch is expanded to [batch, 1, C]."""
    for i, x in enumerate(list(node.inputs)):
        if isinstance(x, gs.Constant) and x.shape[0] == 1:
            repeated = gs.Variable(f"{node.name}_repeated_{i}", dtype=x.dtype)
            shape = _batched_shape(graph, f"{node.name}_{i}", np.array(x.shape, np.int64), source)
            graph.nodes.append(gs.Node("Expand", f"{node.name}_expand_{i}", inputs=[x, shape], outputs=[repeated]))
            node.inputs[i] = repeated


def _batched_shape(graph: gs.Graph, stem: str, shape: np.ndarray, source: gs.Variable) -> gs.Variable:
    """[batch of `source`, *shape[1:]] as a tensor made while the model runs."""
    full, batch, joined = (gs.Variable(f"{stem}_{part}", dtype=np.int64) for part in ("full", "batch", "shape"))
    first, rest = gs.Constant(f"{stem}_first", np.array([0])), gs.Constant(f"{stem}_rest", np.array(shape[1:], np.int64))
    graph.nodes += [
        gs.Node("Shape", f"{stem}_full", inputs=[source], outputs=[full]),
        gs.Node("Gather", f"{stem}_batch", {"axis": 0}, inputs=[full, first], outputs=[batch]),
        gs.Node("Concat", f"{stem}_shape", {"axis": 0}, inputs=[batch, rest], outputs=[joined]),
    ]
    return joined


def _forget_batch(tensor: gs.Variable, *, is_output: bool) -> None:
    if is_output and tensor.shape and tensor.shape[0] == 1:
        tensor.shape = [BATCH, *tensor.shape[1:]]
    elif not is_output:
        tensor.shape = None
