"""E[x] without data: what BatchNormalization says of a tensor, followed through activations, pooling and residual sums.

Each channel is normal where BatchNormalization made it (Nagel et al. 2019, arXiv:1906.04721, section 4.2.1).  Operands of a
sum are taken as independent, the mean over a picture as constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.notes import ChannelStats, channel_stats
from qcompile.ir.ops import const_array, input_at, int_attr, ints_attr
from qcompile.ir.shapes import rank
from qcompile.quant.clipped_normal import clipped_normal

F64 = NDArray[np.float64]
_DEPTH = 64


@dataclass(frozen=True, eq=False)
class _Clipped:
    """min(max(x, low), high) of a normal x in each channel."""

    normal: ChannelStats
    low: F64 | float = -np.inf
    high: F64 | float = np.inf

    def clip(self, low: F64 | float, high: F64 | float) -> _Clipped:
        """Clipped once more."""
        return _Clipped(self.normal, np.clip(self.low, low, high), np.clip(self.high, low, high))

    def moments(self) -> ChannelStats:
        """Mean and deviation."""
        mean, var = clipped_normal(self.normal.mean, self.normal.std, self.low, self.high)
        return ChannelStats(mean, np.sqrt(var))


def expected(value: ir.Value | None) -> ChannelStats | None:
    """Mean and deviation of each channel of `value`; None where no folded BatchNormalization stands behind it."""
    found = _distribution(value, _DEPTH)
    return None if found is None else found.moments()


def _distribution(value: ir.Value | None, depth: int) -> _Clipped | None:
    stats = None if value is None else channel_stats(value)
    if stats is not None:
        return _Clipped(stats)
    node = None if value is None else value.producer()
    follow = _FOLLOWED.get(node.op_type) if node is not None and not node.domain and depth else None
    return None if node is None or follow is None else follow(node, depth - 1)


def _same(node: ir.Node, depth: int) -> _Clipped | None:
    return _distribution(node.inputs[0], depth)


def _relu(node: ir.Node, depth: int) -> _Clipped | None:
    inner = _distribution(node.inputs[0], depth)
    return None if inner is None else inner.clip(0.0, np.inf)


def _clip(node: ir.Node, depth: int) -> _Clipped | None:
    inner, low, high = _distribution(node.inputs[0], depth), _bound(node, 1, -np.inf), _bound(node, 2, np.inf)
    return None if inner is None or low is None or high is None else inner.clip(low, high)


def _extreme(node: ir.Node, depth: int) -> _Clipped | None:
    """Max and Min with a constant."""
    slot = next((i for i in range(2) if const_array(input_at(node, i)) is not None), None)
    bound = None if slot is None or len(node.inputs) != 2 else _bound(node, slot, 0.0)
    inner = None if slot is None else _distribution(node.inputs[1 - slot], depth)
    if inner is None or bound is None:
        return None
    return inner.clip(bound, np.inf) if node.op_type == "Max" else inner.clip(-np.inf, bound)


def _sum(node: ir.Node, depth: int) -> _Clipped | None:
    parts = [found.moments() for v in node.inputs if (found := _distribution(v, depth)) is not None]
    if len(parts) != 2 or parts[0].mean.shape != parts[1].mean.shape:
        return None
    return _Clipped(ChannelStats(parts[0].mean + parts[1].mean, np.hypot(parts[0].std, parts[1].std)))


def _average(node: ir.Node, depth: int) -> _Clipped | None:
    axes = ints_attr(node, "axes") or const_array(input_at(node, 1)) if node.op_type == "ReduceMean" else (2, 3)
    inner = _distribution(node.inputs[0], depth)
    spatial = axes is not None and {int(a) for a in axes} <= {2, 3, -1, -2} and rank(node.inputs[0]) == 4
    if inner is None or not spatial or any(ints_attr(node, "pads") or ()):
        return None
    mean = inner.moments().mean
    return _Clipped(ChannelStats(mean, np.zeros_like(mean)))


def _flat(node: ir.Node, depth: int) -> _Clipped | None:
    """[N, C, H, W] -> [N, C H W]: each channel H W times."""
    inner, shape = _distribution(node.inputs[0], depth), node.outputs[0].shape
    width = shape[1] if shape is not None and len(shape) == 2 and int_attr(node, "axis", 1) == 1 else None
    if inner is None or not isinstance(width, int):
        return None
    found = inner.moments()
    times, rest = divmod(width, found.mean.size)
    return None if rest else _Clipped(ChannelStats(found.mean.repeat(times), found.std.repeat(times)))


def _bound(node: ir.Node, slot: int, missing: float) -> F64 | float | None:
    """A constant that is one number, or one for each channel of axis 1."""
    value = input_at(node, slot)
    array, known = const_array(value), rank(node.outputs[0])
    if array is None:
        return missing if value is None else None
    wide = array.astype(np.float64)
    if wide.size == 1:
        return float(wide.reshape(-1)[0])
    by_channel = known is not None and wide.ndim in (known, known - 1) and wide.size == wide.shape[1 - known]
    return wide.reshape(-1) if by_channel else None


_FOLLOWED: dict[str, Callable[[ir.Node, int], _Clipped | None]] = {
    "Identity": _same, "Dropout": _same, "Relu": _relu, "Clip": _clip, "Max": _extreme, "Min": _extreme, "Add": _sum,
    "GlobalAveragePool": _average, "AveragePool": _average, "ReduceMean": _average,
    "Flatten": _flat, "Reshape": _flat, "Squeeze": _flat,
}  # fmt: skip
