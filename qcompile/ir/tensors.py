"""Every weight of a model, wherever it hides: initializers of all graphs and tensors in attributes (Constant nodes)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

_PIECE = 1 << 20


def named_tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """All constant tensors with the name of their value or attribute; initializers, in name order, come first."""
    for value in _initializers(model):
        if value.const_value is not None:
            yield str(value.name), value.const_value
    for _, attr in _tensor_attributes(model):
        yield attr.name, attr.as_tensor()


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """The tensors whose data lie in another file."""
    return (t for _, t in named_tensors(model) if isinstance(t, ir.ExternalTensor))


def map_tensors(model: ir.Model, change: Callable[[ir.TensorProtocol], ir.TensorProtocol]) -> None:
    """Replace every constant tensor by what `change` makes of it, in the order of `named_tensors`."""
    for value in list(_initializers(model)):
        if value.const_value is not None:
            value.const_value = change(value.const_value)
    for node, attr in list(_tensor_attributes(model)):
        tensor = attr.as_tensor()
        changed = change(tensor)
        if changed is not tensor:
            node.attributes[attr.name] = ir.AttrTensor(attr.name, changed, doc_string=attr.doc_string)


def read_in(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """An external tensor as one in memory; others as they are."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name, doc_string=tensor.doc_string)


def relocated(tensor: ir.ExternalTensor, location: str) -> ir.ExternalTensor:
    """The same external tensor in another file, not looked for until it is read."""
    where = (location, tensor.offset, tensor.length, tensor.dtype)
    return ir.ExternalTensor(*where, shape=tensor.shape, name=str(tensor.name), doc_string=tensor.doc_string)


def placed(tensor: ir.ExternalTensor, folder: Path) -> ir.ExternalTensor:
    """The same external tensor, its file given relative to `folder` (which holds it, perhaps deep inside)."""
    location = Path(os.path.realpath(tensor.path)).relative_to(folder).as_posix()
    where = (location, tensor.offset, tensor.length, tensor.dtype)
    return ir.ExternalTensor(*where, shape=tensor.shape, name=str(tensor.name), base_dir=str(folder))


@contextmanager
def elsewhere(values: Sequence[ir.Value], location: str) -> Generator[None]:
    """Meanwhile the values hold only their names, types and shapes, and for data a file at `location`."""
    tensors = [v.const_value for v in values]
    try:
        for value, tensor in zip(values, tensors, strict=True):
            assert tensor is not None
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor(
                location, 0, int(tensor.nbytes), tensor.dtype, shape=shape, name=str(value.name)
            )
        yield
    finally:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor


def stored_array(tensor: ir.TensorProtocol) -> NDArray[Any]:
    """The values of a constant, contiguous, without a copy where there need not be one; perhaps not aligned."""
    raw = tensor.raw
    return np.ascontiguousarray(raw if isinstance(raw, np.ndarray) and isinstance(tensor, ir.Tensor) else tensor.numpy())


def data_chunks(tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview]:
    """The bytes of `tensor` as ONNX stores them, in order; no copy of them all is made where none is needed."""
    if isinstance(tensor, ir.StringTensor):
        yield b"".join(len(text).to_bytes(8, "little") + bytes(text) for text in tensor.string_data())
        return
    if not isinstance(tensor, ir.ExternalTensor):
        plain = isinstance(tensor, ir.Tensor) and tensor.dtype.bitwidth >= 8 and sys.byteorder == "little"
        yield stored_array(tensor).reshape(-1).view(np.uint8).data if plain else tensor.tobytes()
        return
    left = tensor.length or int(tensor.nbytes)
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset or 0)
        while left and (piece := file.read(min(left, _PIECE))):
            yield piece
            left -= len(piece)


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        for name in sorted(graph.initializers):
            yield graph.initializers[name]


def _tensor_attributes(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Attr]]:
    for nodes in (model.graph.all_nodes(), *(f.all_nodes() for f in model.functions.values())):
        for node in nodes:
            for attr in node.attributes.values():
                if attr.type == ir.AttributeType.TENSOR and not attr.is_ref():
                    yield node, attr
