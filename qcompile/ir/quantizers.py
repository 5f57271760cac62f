"""QuantizeLinear and DequantizeLinear as graphs hold them: their parameters, and the pairs that they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.edit import redirect, swap_output
from qcompile.ir.ops import const_value, input_at, int_attr, is_op
from qcompile.ir.qoperators import is_readable

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
FP4_DYNAMIC, MXFP8_DYNAMIC = "TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize"
MXFP8_DEQUANTIZE = "TRT_MXFP8DequantizeLinear"
_VECTOR = 1


@dataclass(frozen=True, eq=False)
class Affine:
    """x ~ (code - zero_point) scale: constants, per tensor ([]), per slice of `axis` ([n]) or per block (the tensor's rank).

    `scale` and `zero_point` are arrays of equal shape, `dtype` the type of the codes; `block` is 0 without blocks.
    """

    scale: NDArray[np.float64]
    zero_point: NDArray[np.int64]
    dtype: ir.DataType
    axis: int = 1
    block: int = 0

    def equals(self, other: Affine) -> bool:
        """Whether both map codes to the same numbers."""
        same = (self.dtype, self.block) == (other.dtype, other.block) and (not self.scale.ndim or self.axis == other.axis)
        return same and np.array_equal(self.scale, other.scale) and np.array_equal(self.zero_point, other.zero_point)


@dataclass(frozen=True, eq=False)
class Pair:
    """`q` makes codes that nothing but `dq` nodes read, all with its own constants."""

    q: ir.Node
    dqs: tuple[ir.Node, ...]
    affine: Affine

    @property
    def source(self) -> ir.Value:
        """What is quantized."""
        value = self.q.inputs[0]
        assert value is not None
        return value


def is_quantized(graph: ir.Graph) -> bool:
    """Whether `graph` or a body in it holds Q/DQ nodes, or operators on codes that can be read as such."""
    return any(is_op(n, QUANTIZE, DEQUANTIZE) or n.op_type == MXFP8_DEQUANTIZE or is_readable(n) for n in graph.all_nodes())


def affine(node: ir.Node) -> Affine | None:
    """The constants of a Q or DQ node; None where they are computed, or its input has an unknown rank that its axis needs."""
    scale, zero = const_value(input_at(node, 1)), const_value(input_at(node, 2))
    if scale is None or (input_at(node, 2) is not None and zero is None):
        return None
    s, dtype = scale.numpy().astype(np.float64), _code_type(node, zero)
    s = s.reshape(()) if s.size == 1 and s.ndim <= _VECTOR else s
    z = np.zeros(s.shape, np.int64) if zero is None or not dtype.is_integer() else zero.numpy().astype(np.int64).reshape(s.shape)
    axis = int_attr(node, "axis", 1) if s.ndim else 1
    if s.ndim and axis < 0:
        value = node.inputs[0]
        if value is None or value.shape is None:
            return None
        axis += len(value.shape)
    return Affine(s, z, dtype, axis, int_attr(node, "block_size", 0))


def _code_type(node: ir.Node, zero: ir.TensorProtocol | None) -> ir.DataType:
    if zero is not None:
        return zero.dtype
    codes = node.outputs[0] if is_op(node, QUANTIZE) else node.inputs[0]
    named = int_attr(node, "output_dtype", 0) if is_op(node, QUANTIZE) else 0
    if named:
        return ir.DataType(named)
    return codes.dtype if codes is not None and codes.dtype is not None else ir.DataType.UINT8


def pairs(graph: ir.Graph) -> list[Pair]:
    """All pairs of `graph`, in the order of their Q."""
    return [pair for node in graph if is_op(node, QUANTIZE) and (pair := _pair(node)) is not None]


def _pair(q: ir.Node) -> Pair | None:
    own, source, codes = affine(q), q.inputs[0], q.outputs[0]
    readers = [node for node, _ in codes.uses()]
    if own is None or source is None or codes.is_graph_output() or not readers:
        return None
    fits = all(is_op(n, DEQUANTIZE) and n.graph is q.graph and (a := affine(n)) is not None and a.equals(own) for n in readers)
    return Pair(q, tuple(readers), own) if fits else None


def constants(graph: ir.Graph) -> Iterator[tuple[ir.Node, NDArray[Any]]]:
    """The DQ nodes of `graph` that read constant codes, with those."""
    for node in graph:
        codes = const_value(node.inputs[0]) if is_op(node, DEQUANTIZE) else None
        if codes is not None:
            yield node, codes.numpy()


def take_out(graph: ir.Graph, pair: Pair) -> None:
    """Let the readers of a pair read what it quantizes."""
    for dq in pair.dqs:
        made, source = dq.outputs[0], pair.source
        if made.is_graph_output() and (source.producer() is None or source.is_graph_output()):
            redirect(made, source, list(made.uses()))
            continue
        redirect(made, source, list(made.uses()))
        if made.is_graph_output():
            swap_output(graph, made, source)
        graph.remove(dq, safe=True)
    if not pair.q.outputs[0].uses():
        graph.remove(pair.q, safe=True)
