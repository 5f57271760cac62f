"""A model written as one protobuf without ever being one in memory: the large weights go from their files to the file."""

from __future__ import annotations

from typing import BinaryIO

import onnx
import onnx_ir as ir

from qcompile.ir.accept import state_types
from qcompile.ir.notes import spell
from qcompile.ir.spill import SPILLED_TENSOR
from qcompile.ir.tensors import data_chunks, map_tensors, read_in

GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9  # field numbers of ModelProto, GraphProto and TensorProto
LENGTH_DELIMITED = 2


def write_model(model: ir.Model, file: BinaryIO) -> None:
    """Write the self-contained protobuf of `model` (under 2 GB) to an open file.

    A message is the concatenation of its fields in any order, so each large initializer follows the rest of the graph.
    """
    small = model.clone()
    spell(small)
    large = [v for v in small.graph.initializers.values() if v.const_value is not None and v.const_value.nbytes >= SPILLED_TENSOR]
    tensors = [v.const_value for v in large if v.const_value is not None]
    for value in large:
        del small.graph.initializers[str(value.name)]
    map_tensors(small, read_in)
    rest = state_types(ir.to_proto(small))
    graph = rest.graph.SerializeToString(deterministic=True)
    rest.ClearField("graph")
    heads = [_head(value) for value in large]
    length = len(graph) + sum(len(h) + int(t.nbytes) for h, t in zip(heads, tensors, strict=True))
    file.write(rest.SerializeToString(deterministic=True) + tag(GRAPH, length) + graph)
    for head, tensor in zip(heads, tensors, strict=True):
        file.write(head)
        file.writelines(data_chunks(tensor))


def _head(value: ir.Value) -> bytes:
    """An initializer up to its data."""
    tensor = value.const_value
    assert tensor is not None
    proto = onnx.TensorProto(name=str(value.name), data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    head = proto.SerializeToString(deterministic=True) + tag(RAW_DATA, int(tensor.nbytes))
    return tag(INITIALIZER, len(head) + int(tensor.nbytes)) + head


def tag(field: int, length: int) -> bytes:
    """What stands in front of a value of known length: field number and length."""
    return _varint(field << 3 | LENGTH_DELIMITED) + _varint(length)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the high bit says that more follow."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])
