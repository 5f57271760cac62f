"""onnx-graphsurgeon in and out: how users bring their own surgery.

graphsurgeon loses node, value and model metadata, writes 4-bit constants wrongly and copies all weights.  The bridge
re-attaches the metadata by name, refuses 4-bit graphs, and sends large weights as placeholders that load when touched.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, TypeVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.ir.tensor import LazyValues

from qcompile.errors import ModelError
from qcompile.ir.model import Model
from qcompile.ir.notes import Spelled, carry_notes
from qcompile.ir.tensors import map_tensors, named_tensors, read_in

PLACEHOLDER_BYTES = 1_000_000
SurgeryKind = Literal["equivalent", "changes"]

_KIND = "__qcompile_surgery__"
_PREFIX = "qcompile-placeholder:"
_FOUR_BIT = frozenset({ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.FLOAT4E2M1, ir.DataType.INT2, ir.DataType.UINT2})
_travelling: ContextVar[list[ir.TensorProtocol] | None] = ContextVar("placeholders of the export under way", default=None)

F = TypeVar("F", bound=Callable[..., Any])


def surgery(kind: SurgeryKind) -> Callable[[F], F]:
    """Declare what a function on a `gs.Graph` does to the model's float function.

    `equivalent`: it stays, and is verified like any pass.  `changes`: it is meant to change (plugins, NMS, a new
    head), and a new float baseline starts behind it.  A function without a declaration counts as `changes`.

    Raises:
        ValueError: another kind.
    """
    if kind not in ("equivalent", "changes"):
        raise ValueError(f"surgery(kind={kind!r}): choose 'equivalent' or 'changes'")

    def mark(function: F) -> F:
        setattr(function, _KIND, kind)
        return function

    return mark


def surgery_kind(function: Callable[..., Any]) -> SurgeryKind | None:
    """What `function` was declared to be with `@surgery`, or None."""
    return getattr(function, _KIND, None)


def to_gs(model: Model) -> gs.Graph:
    """`model` as a graphsurgeon graph; the model itself is left alone.

    Weights of 1 MB and more are placeholders (`LazyValues`) that load a copy when `.values` is read.

    Raises:
        ModelError: the graph holds int4, uint4 or fp4 tensors, which graphsurgeon cannot write.
    """
    _refuse_four_bit(model)
    hollow, large = model.clone(), list[ir.TensorProtocol]()
    map_tensors(hollow.ir, lambda t: _placeholder(t, large) if t.nbytes >= PLACEHOLDER_BYTES else read_in(t))
    graph = gs.import_onnx(ir.to_proto(hollow.ir))
    for constant in _constants(graph):
        _fill(constant, large)
    return graph


def from_gs(graph: gs.Graph, like: Model) -> Model:
    """The model that `graph` describes, with the metadata of `like`; nodes are sorted and named.

    Raises:
        ModelError: graphsurgeon cannot export the graph.
    """
    return import_graph(graph, like)[0]


def import_graph(graph: gs.Graph, like: Model) -> tuple[Model, list[str]]:
    """`from_gs`, and one remark for each thing that did not survive the journey.

    Raises:
        ModelError: graphsurgeon cannot export the graph.
    """
    proto, travelling = _export(graph)
    model = Model.from_proto(proto, like.path)
    map_tensors(model.ir, lambda t: _restore(t, travelling))
    model.graph.sort()
    return model, _reattach(model, like)


class _MappedValues(LazyValues):
    """A large weight on its way through graphsurgeon: never read unless the user's function touches it."""

    def __init__(self, source: ir.TensorProtocol, lazy: LazyValues) -> None:
        self.source = source
        self.shape, self.dtype, self.nbytes = lazy.shape, lazy.dtype, lazy.nbytes

    @property
    def tensor(self) -> onnx.TensorProto:
        """A placeholder while this module exports the graph, else (constant folding, the user's export) all of it."""
        travelling = _travelling.get()
        stub = self.source if travelling is None else _placeholder(self.source, travelling)
        return ir.to_proto(read_in(stub) if travelling is None else stub)

    def load(self) -> np.ndarray[Any, Any]:
        """A writable copy of the weight."""
        return np.array(self.source.numpy())


def _refuse_four_bit(model: Model) -> None:
    for name, tensor in named_tensors(model.ir):
        if tensor.dtype in _FOUR_BIT:
            raise ModelError(
                f"graphsurgeon cannot carry {name!r}: it writes {tensor.dtype} constants wrongly; "
                "run the surgery before quantization (put it first in --passes)"
            )


def _placeholder(tensor: ir.TensorProtocol, register: list[ir.TensorProtocol]) -> ir.TensorProtocol:
    register.append(tensor)
    location = f"{_PREFIX}{len(register) - 1}"
    return ir.ExternalTensor(location, None, None, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=str(tensor.name))


def _restore(tensor: ir.TensorProtocol, register: list[ir.TensorProtocol]) -> ir.TensorProtocol:
    if not isinstance(tensor, ir.ExternalTensor) or not str(tensor.location).startswith(_PREFIX):
        return tensor
    return register[int(str(tensor.location)[len(_PREFIX) :])]


def _fill(constant: gs.Constant, large: list[ir.TensorProtocol]) -> None:
    lazy = vars(constant)["_values"]
    if not isinstance(lazy, LazyValues) or not lazy.tensor.external_data:
        return
    location = lazy.tensor.external_data[0].value
    constant.values = _MappedValues(large[int(location[len(_PREFIX) :])], lazy)
    vars(constant)["data_location"] = None  # else a value that the user sets is exported as if it lay in a file


def _constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Constants of `graph`, its subgraphs and functions, tensor attributes included."""
    for part in (graph, *graph.subgraphs(recursive=True), *graph.functions):
        yield from (t for t in part.tensors().values() if isinstance(t, gs.Constant))
        yield from (a for n in part.nodes for a in n.attrs.values() if isinstance(a, gs.Constant))


@contextmanager
def _recording() -> Generator[list[ir.TensorProtocol]]:
    travelling: list[ir.TensorProtocol] = []
    token = _travelling.set(travelling)
    try:
        yield travelling
    finally:
        _travelling.reset(token)


def _export(graph: gs.Graph) -> tuple[onnx.ModelProto, list[ir.TensorProtocol]]:
    try:
        with _recording() as travelling:
            return gs.export_onnx(graph), travelling
    except Exception as e:
        raise ModelError(f"graphsurgeon cannot export the graph ({e}); give every graph input and output a dtype") from e


def _reattach(model: Model, like: Model) -> list[str]:
    new, old = model.ir, like.ir
    new.metadata_props.update(old.metadata_props)
    new.graph.metadata_props.update(old.graph.metadata_props)
    new.doc_string, new.domain, new.model_version = old.doc_string, old.domain, old.model_version
    _reattach_values(new, old)
    return _reattach_nodes(new, old) + _uncarried(old)


def _reattach_nodes(new: ir.Model, old: ir.Model) -> list[str]:
    known = {node.name: node for node in old.graph.all_nodes()}
    remarks: list[str] = []
    for node in new.graph.all_nodes():
        was = known.get(node.name)
        if was is None:
            continue
        if (was.op_type, was.domain) == (node.op_type, node.domain):
            carry_notes(was, node)
            node.doc_string = was.doc_string
        elif was.metadata_props or any(isinstance(note, Spelled) for note in was.meta.values()):
            remarks.append(f"metadata of node {node.name!r} dropped: it was {was.op_type}, now it is {node.op_type}")
    return remarks


def _reattach_values(new: ir.Model, old: ir.Model) -> None:
    known = {v.name: v for v in _values(old) if v.metadata_props or v.doc_string}
    for value in _values(new):
        was = known.get(value.name)
        if was is not None:
            value.metadata_props.update(was.metadata_props)
            value.doc_string = was.doc_string


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _uncarried(old: ir.Model) -> list[str]:
    inside = [f.name for f in old.functions.values() if any(n.metadata_props or n.doc_string for n in f.all_nodes())]
    denoted = [v.name for v in old.graph.inputs if _has_denotation(v)]
    remarks = [f"metadata inside function {name!r} dropped: graphsurgeon does not carry it" for name in inside]
    return remarks + [f"dimension denotations of input {name!r} dropped: graphsurgeon does not carry them" for name in denoted]


def _has_denotation(value: ir.Value) -> bool:
    shape = value.shape
    return shape is not None and any(shape.get_denotation(i) for i in range(len(shape)))
