"""GraphView: read-only look-ups over an ONNX graph, for the rule checker and the kernel audit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from qcompile.errors import ModelError
from qcompile.ir.optable import ops_with
from qcompile.ir.reader import read_proto

# what a tensor of codes comes through from one source; MaxPool keeps the codes that it takes
MOVEMENT_OPS = ops_with("movement") - {"Concat", "Dropout", "GatherElements", "GatherND", "Pad", "Tile"} | {"Cast", "MaxPool"}
QUANTIZE_OPS = frozenset({"QuantizeLinear"})
DEQUANTIZE_OPS = frozenset({"DequantizeLinear", "TRT_MXFP8DequantizeLinear"})
WEIGHTED_OPS = ops_with("compute")
DYNAMIC_QUANTIZE_OPS: dict[str, tuple[int, int]] = {  # types of the codes and of the block scales
    "TRT_FP4DynamicQuantize": (TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN),
    "TRT_MXFP8DynamicQuantize": (TensorProto.FLOAT8E4M3FN, TensorProto.UINT8),
}
LOW_TYPES: dict[int, str] = {
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "uint8",
    TensorProto.INT4: "int4",
    TensorProto.UINT4: "uint4",
    TensorProto.FLOAT8E4M3FN: "float8e4m3fn",
    TensorProto.FLOAT8E5M2: "float8e5m2",
    TensorProto.FLOAT4E2M1: "float4e2m1",
    TensorProto.INT16: "int16",
    TensorProto.UINT16: "uint16",
    TensorProto.INT32: "int32",
}


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node of the main graph a name of its own: the operator and a number, or a number behind a taken name."""
    used: set[str] = set()
    for i, node in enumerate(model.graph.node):
        stem = node.name or f"{node.op_type}_{i}"
        name, k = stem, 1
        while name in used:
            name, k = f"{stem}_{k}", k + 1
        node.name = name
        used.add(name)


def uniquely_named(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` itself if its node names are unique and not empty, else a copy with unique names."""
    names = [n.name for n in model.graph.node]
    if len(set(names)) == len(names) and all(names):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    name_nodes(copy)
    return copy


def inner_nodes(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    """The nodes of the bodies of If, Loop and Scan in `graph`."""
    for body in (g for n in graph.node for a in n.attribute for g in (a.g, *a.graphs)):
        yield from body.node
        yield from inner_nodes(body)


class GraphView:
    """Producers, consumers, constants and types of the top-level graph; nothing is copied or changed."""

    def __init__(self, model: onnx.ModelProto, base_dir: Path | None = None) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self._base_dir = str(base_dir or "")
        self._initializers = {t.name: t for t in model.graph.initializer}

    @classmethod
    def open(cls, source: onnx.ModelProto | str | Path) -> GraphView:
        """A view of a loaded model, or of a file (its external data is read on demand)."""
        if isinstance(source, onnx.ModelProto):
            return cls(source)
        path = Path(source)
        return cls(read_proto(path, weights=False), path.parent)

    @property
    def base_dir(self) -> str:
        """The folder of the external data."""
        return self._base_dir

    @cached_property
    def producer(self) -> dict[str, NodeProto]:
        """Tensor name -> the node that makes it."""
        return {name: node for node in self.nodes for name in node.output if name}

    @cached_property
    def consumers(self) -> dict[str, list[tuple[NodeProto, int]]]:
        """Tensor name -> (node, input slot) of every use."""
        uses: dict[str, list[tuple[NodeProto, int]]] = {}
        for node in self.nodes:
            for slot, name in enumerate(node.input):
                uses.setdefault(name, []).append((node, slot))
        return uses

    @cached_property
    def elem_types(self) -> dict[str, int]:
        """Tensor name -> ONNX element type, as far as it is recorded or can be inferred."""
        graph = self._inferred.graph
        infos = [*graph.value_info, *graph.input, *graph.output]
        found = {v.name: v.type.tensor_type.elem_type for v in infos}
        found |= {t.name: t.data_type for t in graph.initializer}
        dynamic = (n for n in self.nodes if n.op_type in DYNAMIC_QUANTIZE_OPS)
        return found | {x: t for n in dynamic for x, t in zip(n.output, DYNAMIC_QUANTIZE_OPS[n.op_type], strict=True)}

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Tensor name -> rank, as far as it is known."""
        graph = self._inferred.graph
        infos = [v for v in (*graph.value_info, *graph.input, *graph.output) if v.type.tensor_type.HasField("shape")]
        found = {v.name: len(v.type.tensor_type.shape.dim) for v in infos}
        return found | {t.name: len(t.dims) for t in graph.initializer}

    @cached_property
    def dims(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> size of each axis, 0 where it is not fixed; as far as the rank is known."""
        graph = self._inferred.graph
        infos = [v for v in (*graph.value_info, *graph.input, *graph.output) if v.type.tensor_type.HasField("shape")]
        found = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in infos}
        return found | {t.name: tuple(t.dims) for t in graph.initializer}

    @cached_property
    def static_names(self) -> frozenset[str]:
        """Tensors whose every axis has a known size."""
        return frozenset(name for name, dims in self.dims.items() if all(d > 0 for d in dims))

    @cached_property
    def _inferred(self) -> onnx.ModelProto:
        try:
            return onnx.shape_inference.infer_shapes(self.model)
        except Exception:  # onnx raises a bare RuntimeError or InferenceError; types stay as recorded
            return self.model

    def opset(self, domain: str = "") -> int:
        """Imported version of `domain`, 0 when it is not imported."""
        return next((o.version for o in self.model.opset_import if o.domain == domain), 0)

    def constant_proto(self, name: str) -> TensorProto | None:
        """The tensor behind `name` if it is an initializer or a Constant node's value."""
        if name in self._initializers:
            return self._initializers[name]
        node = self.producer.get(name)
        if node is None or node.op_type not in ("Constant", "Identity"):
            return None
        if node.op_type == "Identity":
            return self.constant_proto(node.input[0])
        return next((a.t for a in node.attribute if a.name == "value"), None)

    def constant(self, name: str) -> NDArray[np.generic] | None:
        """The value behind `name`, or None if it is not constant.

        Raises:
            ModelError: its external data cannot be read.
        """
        proto = self.constant_proto(name)
        try:
            return None if proto is None else numpy_helper.to_array(proto, self._base_dir)
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise ModelError(f"the value of {name!r} cannot be read ({error}); put the external data beside the model") from error

    def is_constant(self, name: str) -> bool:
        """Whether `name` is computed from initializers and Constant nodes only (through casts, Q/DQ, movement)."""
        if self.constant_proto(name) is not None:
            return True
        node = self.producer.get(name)
        folds = MOVEMENT_OPS | QUANTIZE_OPS | DEQUANTIZE_OPS
        return node is not None and node.op_type in folds and self.is_constant(node.input[0])

    def origin(self, name: str) -> str:
        """`name` traced back through data movement to the tensor that holds the values."""
        node = self.producer.get(name)
        while node is not None and node.op_type in MOVEMENT_OPS and len(node.input):
            name = node.input[0]
            node = self.producer.get(name)
        return name

    def dequantizer(self, name: str) -> NodeProto | None:
        """The DequantizeLinear that `name` comes from through data movement, if any.

        Behind a Concat it is the first one, provided that every input comes from one.
        """
        node = self.producer.get(self.origin(name))
        if node is not None and node.op_type == "Concat":
            sources = [self.dequantizer(x) for x in node.input]
            return sources[0] if sources and all(s is not None for s in sources) else None
        return node if node is not None and node.op_type in DEQUANTIZE_OPS else None

    def low_type(self, dq: NodeProto) -> str | None:
        """The element type of the codes that `dq` reads, e.g. "int8"; None when unknown."""
        return LOW_TYPES.get(self.elem_types.get(dq.input[0], 0)) or self._declared_type(dq)

    def _declared_type(self, dq: NodeProto) -> str | None:
        q = self.producer.get(dq.input[0])
        return None if q is None or q.op_type not in QUANTIZE_OPS else self.output_type(q)

    def output_type(self, q: NodeProto) -> str | None:
        """The code type that a QuantizeLinear writes: its zero point's, else `output_dtype`, else uint8."""
        if len(q.input) > 2 and q.input[2]:
            return LOW_TYPES.get(self.elem_types.get(q.input[2], 0))
        return LOW_TYPES.get(int(attribute(q, "output_dtype", 0)) or TensorProto.UINT8)

    def axis_after(self, name: str, axis: int) -> int | None:
        """Where `axis` of the tensor behind `name` (before data movement) lies in `name`; None after a reshape."""
        node = self.producer.get(name)
        if node is None or node.op_type not in MOVEMENT_OPS:
            return axis
        before = self.axis_after(node.input[0], axis)
        if before is None or node.op_type in ("Identity", "Cast", "Slice", "MaxPool"):
            return before
        if node.op_type == "Transpose":
            perm = int_list(node, "perm", [])
            return perm.index(before) if before in perm else None
        return None

    def of_type(self, *op_types: str) -> Iterator[NodeProto]:
        """Nodes of the default domain with one of `op_types`, in graph order."""
        return (n for n in self.nodes if n.op_type in op_types and n.domain in ("", "ai.onnx"))


def attribute(node: NodeProto, name: str, default: float | int) -> float | int:
    """A scalar attribute of `node`."""
    for a in node.attribute:
        if a.name == name:
            return a.i if a.type == onnx.AttributeProto.INT else a.f
    return default


def int_list(node: NodeProto, name: str, default: list[int]) -> list[int]:
    """A list-of-integers attribute of `node`."""
    return next((list(a.ints) for a in node.attribute if a.name == name), default)
