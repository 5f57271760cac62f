"""GroupNorm and InstanceNorm as norms over the last axis: which elements make a group."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.ir.ops import const_array, const_ints, int_attr, is_op, static_shape
from qcompile.structure.norm import Norm


@dataclass(frozen=True)
class Groups:
    """[N, *shape] is [N, count, size] in groups; `shape` starts with the channels."""

    count: int
    size: int
    shape: tuple[int, ...]

    def along_channels(self, values: np.ndarray) -> np.ndarray:
        """One number a channel, as [C, 1, ...]."""
        return values.reshape(-1, *(1,) * (len(self.shape) - 1))


def groups_of(norm: Norm) -> Groups | str:
    """The groups of a norm of kind "group", or why they are not known."""
    shape = static_shape(norm.input)
    if shape is None or len(shape) < 3 or not all(shape[1:]):
        return "the size of its groups is not known before run time"
    sizes = tuple(d or 0 for d in shape[1:])
    count = _count(norm.nodes[0], sizes[0])
    if count is None or sizes[0] % count:
        return "its number of groups is not known before run time"
    if is_op(norm.nodes[0], "Reshape") and not _plain(norm.nodes[1]):
        return "it scales groups before it scales channels"
    return Groups(count, math.prod(sizes) // count, sizes)


def _count(first: ir.Node, channels: int) -> int | None:
    if is_op(first, "GroupNormalization"):
        return int_attr(first, "num_groups", 1)
    if is_op(first, "InstanceNormalization"):
        return channels
    target = const_ints(first.inputs[1])
    return target[1] if target is not None and len(target) > 2 and target[1] > 0 else None


def _plain(instance: ir.Node) -> bool:
    """Whether the InstanceNormalization inside a chain scales by 1 and adds 0."""
    scale, bias = (const_array(v) for v in instance.inputs[1:3])
    return scale is not None and bias is not None and bool(np.all(scale == 1) and np.all(bias == 0))
