"""The two 16-bit floating-point types, and what about a tensor has to be measured before it is stored in one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe import AbsMax, AbsMaxStat, MinMax, MinMaxStat, Probe
from qcompile.ir.ops import const_array, is_data_movement, is_op
from qcompile.ir.schemas import is_tensor
from qcompile.rewrite.half.bounds import is_quantizer

FLOAT = ir.DataType.FLOAT
_SMALL = 256.0  # a few such biases fit into the margin above `safe`


@dataclass(frozen=True)
class Narrow:
    """A floating-point type narrower than float32.

    `largest` finite and smallest `normal` number; every integer up to `integers` is exact.
    """

    title: str
    dtype: ir.DataType
    largest: float
    normal: float
    integers: int

    @property
    def safe(self) -> float:
        """A quarter of the largest number: what calibration data may reach, a margin for other data."""
        return self.largest / 4

    @property
    def ranged(self) -> bool:
        """Whether float32 values may overflow or vanish in it."""
        return self.largest < 1e30

    @property
    def angle(self) -> float:
        """The largest argument of Sin and Cos whose neighbour is at most 2^-7 away."""
        return self.integers / 256

    def round(self, array: NDArray, low: float | None = None) -> NDArray:
        """A copy in this type: finite numbers saturate (at `low` from below) instead of overflowing, infinities stay."""
        bounded = np.clip(array, -self.largest if low is None else low, self.largest)
        return np.where(np.isinf(array) & (low is None), array, bounded).astype(self.dtype.numpy())


FLOAT16 = Narrow("float16", ir.DataType.FLOAT16, 65504.0, 2.0**-14, 2048)
BFLOAT16 = Narrow("bfloat16", ir.DataType.BFLOAT16, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), 2.0**-126, 256)


def probe(value: ir.Value) -> Probe[MinMaxStat] | Probe[AbsMaxStat]:
    """Per channel for tokens [batch, tokens, channels], since such extremes follow folds, also where the value is copied into
    that layout next; per tensor for the rest."""
    value = copy = source(value)
    while (
        not _is_tokens(copy)
        and len(uses := list(copy.uses())) == 1
        and is_op(uses[0][0], "Reshape", "Transpose")
        and not copy.is_graph_output()
    ):
        copy = uses[0][0].outputs[0]
    return MinMax(-1).of(copy) if _is_tokens(copy) else AbsMax().of(value)


def source(value: ir.Value) -> ir.Value:
    """What bounds `value`: the tensor that it is after small constants are added, or it is scaled down by one."""
    while (step := _step(value)) is not None:
        value = step
    return value


def grown(value: ir.Value, peak: float) -> float:
    """The largest magnitude of `value`, from the `peak` of its source."""
    step, node = _step(value), value.producer()
    if step is None or node is None:
        return peak
    constant = const_array(node.inputs[1] if node.inputs[0] is step else node.inputs[0])
    size, inner = np.abs(np.asarray(constant, np.float64)), grown(step, peak)
    match node.op_type:
        case "Add":
            return inner + float(size.max())
        case "Mul":
            return inner * float(size.max())
        case _:
            return inner / float(size.min())


def _step(value: ir.Value) -> ir.Value | None:
    node = value.producer()
    if node is None or not is_op(node, "Add", "Mul", "Div") or len(node.inputs) != 2:
        return None
    slot = next((i for i in (0, 1) if const_array(node.inputs[1 - i]) is not None), None)
    data = node.inputs[slot] if slot is not None else None
    return data if data is not None and slot is not None and data.dtype == FLOAT and _harmless(node, slot) else None


def _harmless(node: ir.Node, slot: int) -> bool:
    constant = const_array(node.inputs[1 - slot])
    if constant is None or not constant.size or constant.dtype.kind != "f":
        return False
    size = np.abs(constant)
    match node.op_type:
        case "Add":
            return bool(size.max() <= _SMALL)
        case "Mul":
            return bool(size.max() <= 1)
        case _:
            return slot == 0 and bool(size.min() >= 1)


def _is_tokens(value: ir.Value) -> bool:
    """Of a known number of channels: the last axis of attention scores may be as long as the sample."""
    return value.shape is not None and len(value.shape) == 3 and isinstance(value.shape[-1], int)


def largest(stat: MinMaxStat | AbsMaxStat) -> float:
    """The largest magnitude that a statistic has seen."""
    return float(np.abs([stat.lo, stat.hi]).max())


def before_quantizer(value: ir.Value) -> ir.Value:
    """The value in front of a Q/DQ pair: the name that statistics were collected under."""
    producer = value.producer()
    while is_quantizer(producer) and producer is not None:
        source = producer.inputs[0]
        if source is None or source.const_value is not None:
            return value
        value, producer = source, source.producer()
    return value


def float_constants(node: ir.Node) -> Iterator[tuple[int, NDArray]]:
    """(slot, array) of the float32 initializers that `node` reads, empty ones aside."""
    for slot, value in enumerate(node.inputs):
        if value is not None and value.dtype == FLOAT and value.const_value is not None and value.const_value.size:
            yield slot, value.const_value.numpy()


def is_float(value: ir.Value | None) -> bool:
    """Whether `value` is a float32 tensor (a sequence has the type of its elements)."""
    return value is not None and value.dtype == FLOAT and is_tensor(value)


def carries_float(node: ir.Node) -> bool:
    """Whether a float32 tensor goes in or out."""
    return any(is_float(v) for v in (*node.inputs, *node.outputs))


def copies(node: ir.Node) -> bool:
    """Whether every output element is an input element, possibly cut off below at zero or converted."""
    return is_data_movement(node) or is_op(node, "Relu", "LeakyRelu", "MaxPool", "Cast", "Clip", "GlobalMaxPool", "ReduceMax")
