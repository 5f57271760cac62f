"""The integer part of a model as one JSON document, for firmware, FPGA and compiler people (docs/guide/integer.md)."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qcompile.errors import ModelError
from qcompile.oracle.fuse import Layer, layers
from qcompile.oracle.graph import Border, IntegerGraph, integer_graph
from qcompile.oracle.ranges import inferred

Array = NDArray[Any]
FORMAT, VERSION = "qcompile-integer", 1


def export_document(model: onnx.ModelProto, base_dir: str = "") -> dict[str, Any]:
    """`format, version, rounding, profile, inputs, outputs, constants, layers`; everything else follows from these.

    Raises:
        ModelError: the model's borders are not Q and DQ (see `integer_graph`), or it is not of the profile strict.
    """
    graph = integer_graph(model, base_dir)
    _require_strict(graph)
    types, shapes = inferred(model)
    made = layers(graph)
    used = {name for layer in made for name in layer.inputs if name in graph.constants}
    integers = {name: {"name": name, "tensor": name} for name in (*graph.inputs, *graph.outputs)}
    return {
        "format": FORMAT,
        "version": VERSION,
        "rounding": graph.metadata.get("qcompile.rounding", "half_up"),
        "profile": graph.metadata.get("qcompile.integer", "strict"),
        "inputs": [*(_border(e, e.dtype) for e in graph.entries), *(integers[n] for n in graph.inputs)],
        "outputs": [*(_border(e, types.get(e.codes, e.dtype)) for e in graph.exits), *(integers[n] for n in graph.outputs)],
        "constants": {name: tensor(graph.constants[name]) for name in sorted(used)},
        "tensors": {out: _described(out, types, shapes) for layer in made for out in layer.outputs if out},
        "layers": [_layer(layer) for layer in made],
    }


def _require_strict(graph: IntegerGraph) -> None:
    profile = graph.metadata.get("qcompile.integer", "strict")
    if profile != "strict":
        raise ModelError(f"the model's profile {profile} rescales in float; compile it with integer{{profile=strict}}")


def tensor(array: Array) -> dict[str, Any]:
    """dtype, shape and the elements in row-major order, little-endian, as base64."""
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": base64.b64encode(little.tobytes()).decode()}


def _border(border: Border, dtype: np.dtype[Any]) -> dict[str, Any]:
    return {
        "name": border.outer,
        "tensor": border.codes,
        "dtype": str(dtype),
        "scale": [float(s) for s in border.scale.reshape(-1)],
        "zero_point": [int(z) for z in border.zero_point.reshape(-1)],
        "axis": border.axis if border.scale.size > 1 else None,
    }


def _described(name: str, types: dict[str, np.dtype[Any]], shapes: dict[str, tuple[int | None, ...]]) -> dict[str, Any]:
    shape = shapes.get(name)
    return {"dtype": str(types[name]) if name in types else None, "shape": None if shape is None else list(shape)}


def _layer(layer: Layer) -> dict[str, Any]:
    attributes = {key: _attribute(key, value) for key, value in layer.attributes.items()}
    parameters = {role: tensor(array) for role, array in layer.parameters.items()}
    head = {"name": layer.name, "op": layer.op, "inputs": list(layer.inputs), "outputs": list(layer.outputs)}
    return {**head, **attributes, **parameters}


def _attribute(key: str, value: Any) -> Any:
    """Types by name; lists as lists; tensors as tensors."""
    if key in ("to", "dtype"):
        return str(np.dtype(helper.tensor_dtype_to_np_dtype(int(value))))
    if isinstance(value, TensorProto):
        return tensor(onnx.numpy_helper.to_array(value))
    return list(value) if isinstance(value, (list, tuple)) else value
