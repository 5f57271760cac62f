"""Write nodes in place of one operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.edit import add_constant, fresh_name, new_node, replace_value
from qcompile.ir.ops import input_at
from qcompile.ir.shapes import dims

Operand = ir.Value | NDArray[Any] | float | None
_AXES_ARE_INPUTS = {"Unsqueeze": 13, "Squeeze": 13, "ReduceSum": 13}
_REDUCE_AXES = 18
_FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


class Kept(Exception):
    """An operator that is not taken apart, and why; nothing was changed."""


Written = dict[tuple[object, ...], ir.Value]
"""What was written so far: (operator, inputs, attributes) -> output, (type, shape, bytes) -> constant."""


class Writer:
    """Collects the nodes that compute what `node` does; `finish` puts them into the graph in its place.

    Numbers and arrays become constants, floating-point ones of the type that the operator computes in.  What an earlier operator
    wrote (`written`) is read again and not computed twice: the masks of all layers are one.
    `assumes`: what must hold of the data.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node, opset: int, written: Written) -> None:
        self.graph, self.node, self.opset = graph, node, opset
        kinds = [v.dtype for v in node.inputs if v is not None and v.dtype in _FLOATS]
        self.dtype = kinds[0] if kinds else ir.DataType.FLOAT
        self.nodes: list[ir.Node] = []
        self.written, self.new = written, Written()
        self.assumes = ""

    def input(self, slot: int) -> ir.Value | None:
        """An input of the operator, None where it is left out."""
        return input_at(self.node, slot)

    def require(self, slot: int, what: str) -> ir.Value:
        """Raises Kept: the input is left out."""
        value = self.input(slot)
        if value is None:
            raise Kept(f"it has no {what}")
        return value

    def used(self, index: int) -> bool:
        """Whether anything reads output `index`."""
        outs = self.node.outputs
        return index < len(outs) and bool(outs[index].uses() or outs[index].is_graph_output())

    def __call__(self, op: str, *inputs: Operand, name: str = "", **attributes: Any) -> ir.Value:
        """A node with one output."""
        stem = f"{self.node.name or self.node.outputs[0].name}_{name or op.lower()}"
        values = [v if v is None or isinstance(v, ir.Value) else self.constant(v, f"{stem}_by") for v in inputs]
        key = (op, *values, *sorted((k, str(v)) for k, v in attributes.items()))
        return self._once(key, lambda: self._node(op, values, stem, attributes))

    def constant(self, array: NDArray[Any] | float, stem: str) -> ir.Value:
        """An initializer; equal ones are one."""
        made = np.asarray(array)
        dtype = self.dtype if made.dtype.kind == "f" else None
        made = made if dtype is None else made.astype(dtype.numpy())
        key = (str(made.dtype), made.shape, made.tobytes())
        return self._once(key, lambda: add_constant(self.graph, stem, made, dtype))

    def _once(self, key: tuple[object, ...], make: Callable[[], ir.Value]) -> ir.Value:
        found = self.written.get(key) or self.new.get(key)
        if found is None:
            found = self.new[key] = make()
        return found

    def _node(self, op: str, values: list[ir.Value | None], stem: str, attributes: dict[str, Any]) -> ir.Value:
        made = new_node(self.graph, op, values, name=stem, attributes=attributes)
        self.nodes.append(made)
        return made.outputs[0]

    def axes(self, op: str, value: ir.Value, *axes: int, **attributes: Any) -> ir.Value:
        """Unsqueeze, Squeeze or a reduction over `axes`, in the spelling of the opset."""
        if self.opset >= _AXES_ARE_INPUTS.get(op, _REDUCE_AXES):
            return self(op, value, np.array(axes, np.int64), **attributes)
        return self(op, value, axes=list(axes), **attributes)

    def size(self, value: ir.Value, axis: int) -> ir.Value | NDArray[np.int64]:
        """The length of an axis as a vector of one: a constant where it is known."""
        known = (dims(value) or {axis: None})[axis]
        if isinstance(known, int):
            return np.array([known], np.int64)
        return self("Gather", self("Shape", value), np.array([axis], np.int64))

    def reshape(self, value: ir.Value, *target: int | ir.Value | NDArray[np.int64], name: str = "") -> ir.Value:
        """Reshape to sizes of which some may be computed vectors; 0 copies, -1 is what is left."""
        parts = [np.array([p], np.int64) if isinstance(p, int) else p for p in target]
        if all(isinstance(p, np.ndarray) for p in parts):
            return self("Reshape", value, np.concatenate([p for p in parts if isinstance(p, np.ndarray)]), name=name)
        return self("Reshape", value, self("Concat", *parts, axis=0), name=name)

    def slice(self, value: ir.Value, axis: int, start: int, end: int) -> ir.Value:
        """Elements [start, end) of one axis."""
        return self("Slice", value, *(np.array([i], np.int64) for i in (start, end, axis)))

    def parts(self, value: ir.Value, axis: int, sizes: Sequence[int]) -> list[ir.Value]:
        """Pieces of these sizes, which stand behind each other along one axis."""
        return [self.slice(value, axis, end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]

    def finish(self, *results: ir.Value | None) -> None:
        """Put the nodes in the operator's place; `results` are its outputs, None for those that nothing reads.

        Tensors keep their names, since they keep their values.
        """
        self.graph.insert_before(self.node, self.nodes)
        self.written.update(self.new)
        for old, new in zip(self.node.outputs, results, strict=False):
            if new is not None and (old.uses() or old.is_graph_output()):
                self._replace(old, new)
        self.graph.remove(self.node, safe=True)

    def _replace(self, old: ir.Value, new: ir.Value) -> None:
        name, was_output, made_here = old.name, old.is_graph_output(), new.producer() in self.nodes
        if was_output and (not made_here or new.is_graph_output()):  # the interface needs a tensor of its own
            copy = new_node(self.graph, "Identity", [new], name=f"{name}_copy", like=old)
            self.graph.insert_before(self.node, copy)
            new, made_here = copy.outputs[0], True
        if new.type is None:
            new.type = old.type
        if new.shape is None and old.shape is not None:
            new.shape = old.shape.copy()
        replace_value(self.graph, old, new)
        if not was_output and made_here:
            old.name = fresh_name(self.graph, f"{name}_before")
            new.name = name
