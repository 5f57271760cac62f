"""What an integer graph costs a sample: multiply-accumulates, bit operations, bytes of weights (HAWQ-V3's three measures)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from qcompile.oracle import interval
from qcompile.oracle.graph import Op
from qcompile.oracle.interval import Range
from qcompile.oracle.scene import Scene

OPERANDS = {"ConvInteger": (0, 1), "MatMulInteger": (0, 1), "QLinearConv": (0, 3), "QLinearMatMul": (0, 3)}
_CONVOLUTIONS = ("ConvInteger", "QLinearConv")


@dataclass(frozen=True)
class LayerCost:
    """A convolution or matrix product: multiply-accumulates of one sample, and the bits that its operands' codes need.

    `weight_bytes` counts codes at that width, 0 where the second operand is computed.
    """

    node: str
    op: str
    macs: int
    activation_bits: int
    weight_bits: int
    weight_bytes: int

    @property
    def bops(self) -> int:
        """Bit operations: macs times the bits of both operands."""
        return self.macs * self.activation_bits * self.weight_bits

    def to_json(self) -> dict[str, Any]:
        """The keys node, op, macs, activation_bits, weight_bits, bops, weight_bytes."""
        return {**vars(self), "bops": self.bops}


@dataclass(frozen=True)
class Cost:
    """What all layers cost for one sample."""

    layers: tuple[LayerCost, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return sum(layer.macs for layer in self.layers)

    @property
    def bops(self) -> int:
        """Bit operations."""
        return sum(layer.bops for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weight codes."""
        return sum(layer.weight_bytes for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """The keys macs, bops, weight_bytes and layers."""
        total = {"macs": self.macs, "bops": self.bops, "weight_bytes": self.weight_bytes}
        return {**total, "layers": [layer.to_json() for layer in self.layers]}


def layer_cost(scene: Scene, op: Op) -> LayerCost | None:
    """The cost of a convolution or product, from proven ranges; None for others and for sums by ones (average pooling).

    Axes of unknown length (the batch) count once; a layer of unknown rank is left out.
    """
    if op.type not in OPERANDS or any(name not in scene.shapes for name in (*op.inputs[:1], *op.outputs)):
        return None
    x, w = OPERANDS[op.type]
    weight = scene.constant(op, w)
    if weight is not None and op.type in _CONVOLUTIONS and (weight == 1).all():
        return None
    of_weight = scene.of(op, w) if weight is None else interval.constant(weight)
    bits = bits_of(of_weight)
    stored = 0 if weight is None else -(-weight.size * bits // 8)
    return LayerCost(op.name, op.type, _macs(scene, op, x, w), bits_of(scene.of(op, x)), bits, stored)


def _macs(scene: Scene, op: Op, x: int, w: int) -> int:
    made = scene.shape(op.outputs[0])
    if op.type in _CONVOLUTIONS:
        return _count(scene.shape(op.inputs[w])) * _count(made[2:])
    return _count(made) * (scene.shape(op.inputs[x])[-1] or 1)


def _count(sizes: tuple[int | None, ...]) -> int:
    return prod(n or 1 for n in sizes)


def bits_of(found: Range) -> int:
    """The width of the two's complement (or, without negative numbers, unsigned) integers that hold the range."""
    low, high = found.low, found.high
    return max(high.bit_length(), (~low).bit_length() if low < 0 else 0) + (low < 0)
