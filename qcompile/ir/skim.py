"""A serialized model without its large weights: what an ordinary parser would copy stays in the mapped file.

A protobuf message is a sequence of (tag, value); a nested message is a value with its length in front.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto

from qcompile.ir.stream import GRAPH, INITIALIZER, LENGTH_DELIMITED, RAW_DATA, tag

Bytes = bytes | mmap.mmap

LARGE_TENSOR = 1 << 14
_FIXED = {1: 8, 5: 4}  # bytes of the wire types of fixed length
_VARINT = 0


@dataclass(frozen=True)
class Skimmed:
    """A weight that stayed in the file."""

    name: str
    array: NDArray[Any]


@dataclass(frozen=True)
class Found:
    """The model without the data of `tensors`."""

    rest: bytes
    tensors: list[Skimmed]


class _Field(NamedTuple):
    number: int
    kind: int
    start: int  # of the tag
    value: int  # where the value begins
    end: int


def skim(data: Bytes) -> Found:
    """The initializers of the main graph from 16 KiB on stay in `data`.

    Raises:
        ValueError: not a model, or one that is written in an unusual way.
    """
    if sys.byteorder != "little":
        raise ValueError("the file holds little-endian numbers")
    fields = list(_fields(data, 0, len(data)))
    graphs = [f for f in fields if f.number == GRAPH and f.kind == LENGTH_DELIMITED]
    if len(graphs) != 1:
        raise ValueError("not one graph")
    tensors: list[Skimmed] = []
    graph = _graph(data, graphs[0], tensors)
    if len({t.name for t in tensors}) != len(tensors):
        raise ValueError("two weights of one name")
    pieces = [_nested(GRAPH, graph) if f is graphs[0] else data[f.start : f.end] for f in fields]
    return Found(b"".join(pieces), tensors)


def _graph(data: Bytes, graph: _Field, tensors: list[Skimmed]) -> bytes:
    pieces: list[bytes] = []
    kept = graph.value  # neighbours that stay are copied together
    for f in _fields(data, graph.value, graph.end):
        if f.number != INITIALIZER or f.kind != LENGTH_DELIMITED or f.end - f.value < LARGE_TENSOR:
            continue
        found = _hollow(data, f)
        if found is not None:
            head, tensor = found
            pieces += [data[kept : f.start], _nested(INITIALIZER, head)]
            tensors.append(tensor)
            kept = f.end
    return b"".join([*pieces, data[kept : graph.end]])


def _hollow(data: Bytes, tensor: _Field) -> tuple[bytes, Skimmed] | None:
    """The tensor without its raw data, and the data; None where it is stored otherwise or in a type that NumPy lacks."""
    fields = list(_fields(data, tensor.value, tensor.end))
    raw = [f for f in fields if f.number == RAW_DATA and f.kind == LENGTH_DELIMITED]
    rest = b"".join(data[f.start : f.end] for f in fields if f not in raw)
    if len(raw) != 1 or len(rest) > LARGE_TENSOR:
        return None
    proto = TensorProto.FromString(rest)
    dtype = ir.DataType(proto.data_type)
    plain = dtype != ir.DataType.STRING and dtype.bitwidth >= 8 and proto.data_location != TensorProto.EXTERNAL
    if not plain or not proto.name:
        return None
    shape, kind = tuple(proto.dims), dtype.numpy()
    size = int(np.prod(shape, dtype=np.int64))
    if size * kind.itemsize != raw[0].end - raw[0].value:
        return None
    array = np.frombuffer(data, kind, size, raw[0].value).reshape(shape)
    proto.raw_data = b""
    return proto.SerializeToString(), Skimmed(proto.name, array)


def _nested(number: int, message: bytes) -> bytes:
    return tag(number, len(message)) + message


def _fields(data: Bytes, at: int, end: int) -> Iterator[_Field]:
    while at < end:
        start = at
        key, at = _read(data, at, end)
        kind = key & 7
        if kind == LENGTH_DELIMITED:
            length, at = _read(data, at, end)
        elif kind == _VARINT:
            length = _read(data, at, end)[1] - at
        elif kind in _FIXED:
            length = _FIXED[kind]
        else:
            raise ValueError(f"wire type {kind}")
        if at + length > end:
            raise ValueError("cut short")
        yield _Field(key >> 3, kind, start, at, at + length)
        at += length


def _read(data: Bytes, at: int, end: int) -> tuple[int, int]:
    """A varint, and where it ends."""
    number = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise ValueError("no number")
