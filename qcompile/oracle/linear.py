"""ConvInteger, MatMulInteger, MatMul and MaxPool: windows and sums of products in int64, stored in the operator's type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.errors import ModelError
from qcompile.oracle import checked
from qcompile.oracle.elementwise import Inputs, Kernel, present
from qcompile.oracle.graph import Op

Array = NDArray[Any]
INT32 = np.dtype(np.int32)


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution or pooling: one number for each spatial axis; `pads` are (begin, end)."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]

    @property
    def reach(self) -> tuple[int, ...]:
        """Elements from the first to the last that a window touches."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))


def window(op: Op, sizes: Sequence[int], kernel: Sequence[int]) -> Window:
    """The window of `op` on a picture of `sizes`; `ceil_mode` becomes padding at the end."""
    rank = len(kernel)
    strides = tuple(op.attributes.get("strides", [1] * rank))
    dilations = tuple(op.attributes.get("dilations", [1] * rank))
    flat = Window(tuple(kernel), strides, dilations, ((0, 0),) * rank)
    auto = op.attributes.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = [_same(n, r, s, auto == "SAME_UPPER") for n, r, s in zip(sizes, flat.reach, strides, strict=True)]
    else:
        p = [0] * (2 * rank) if auto == "VALID" else list(op.attributes.get("pads", [0] * (2 * rank)))
        pads = list(zip(p[:rank], p[rank:], strict=True))
    if op.attributes.get("ceil_mode", 0):
        pads = [_ceiling(n, r, s, p) for n, r, s, p in zip(sizes, flat.reach, strides, pads, strict=True)]
    return Window(flat.kernel, strides, dilations, tuple(pads))


def _same(size: int, reach: int, stride: int, upper: bool) -> tuple[int, int]:
    whole = max((-(-size // stride) - 1) * stride + reach - size, 0)
    small, large = whole // 2, whole - whole // 2
    return (small, large) if upper else (large, small)


def _ceiling(size: int, reach: int, stride: int, pads: tuple[int, int]) -> tuple[int, int]:
    """More padding at the end for the last, incomplete window, unless that would start in the padding."""
    left = size + sum(pads) - reach
    count = -(-left // stride)
    if count * stride >= size + pads[0]:
        count -= 1
    return pads[0], max(pads[1], pads[1] + count * stride - left)


def windows(x: Array, w: Window, fill: int) -> Array:
    """[N, C, *spatial] -> a view [N, C, *out, *kernel] of the padded picture."""
    padded = np.pad(x, [(0, 0), (0, 0), *w.pads], constant_values=fill)
    axes = tuple(range(2, x.ndim))
    views = np.lib.stride_tricks.sliding_window_view(padded, w.reach, axis=axes)
    outer = tuple(slice(None, None, s) for s in w.strides)
    return views[(slice(None), slice(None), *outer, *(slice(None, None, d) for d in w.dilations))]


def _max_pool(op: Op, inputs: Inputs) -> list[Array]:
    (x,) = present(inputs)
    if len([o for o in op.outputs if o]) > 1:
        raise ModelError(f"{op}: the indices of MaxPool are not in the integer oracle; remove that output")
    view = windows(x, window(op, x.shape[2:], op.attributes["kernel_shape"]), int(np.iinfo(x.dtype).min))
    return [view.max(axis=tuple(range(x.ndim, view.ndim)))]


def centered(x: Array, zero: Array | None, axis: int | None = None) -> NDArray[np.int64]:
    """x - zero in int64; a zero point with an entry per channel lies along `axis`."""
    wide = x.astype(np.int64)
    if zero is None:
        return wide
    if axis is not None and zero.ndim == 1 and zero.size > 1:
        zero = zero.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
    return wide - (zero.reshape(()) if zero.size == 1 else zero).astype(np.int64)


def _conv_integer(op: Op, inputs: Inputs) -> list[Array]:
    x, weight, x_zero, w_zero = (*inputs, None, None)[:4]
    assert x is not None and weight is not None
    w, groups = centered(weight, w_zero, 0), int(op.attributes.get("group", 1))
    view = windows(centered(x, x_zero), window(op, x.shape[2:], weight.shape[2:]), 0)
    parts = [_correlate(v, k) for v, k in zip(np.split(view, groups, axis=1), np.split(w, groups, axis=0), strict=True)]
    return [checked.fit(np.concatenate(parts, axis=1), INT32)]


def _correlate(view: Array, weight: Array) -> Array:
    """[N, C, *out, *kernel] x [M, C, *kernel] -> [N, M, *out]."""
    spatial = view.ndim // 2 - 1
    rows = np.moveaxis(view, 1, 1 + spatial)
    n, out = rows.shape[0], rows.shape[1 : 1 + spatial]
    flat = product(rows.reshape(-1, weight[0].size), weight.reshape(len(weight), -1).T)
    return np.moveaxis(flat.reshape(n, *out, len(weight)), -1, 1)


def product(a: Array, b: Array) -> Array:
    """[M, K] x [K, N] in int64; einsum's integer loop over two contiguous rows is the fastest that numpy has."""
    require_product(a, b)
    return np.einsum("mk,nk->mn", np.ascontiguousarray(a), np.ascontiguousarray(b.T))


def require_product(a: Array, b: Array) -> None:
    """Raises Overflow: a sum of K products of these extents might leave int64."""
    (a0, a1), (b0, b1) = checked.extent(a), checked.extent(b)
    bound = a.shape[-1] * max(abs(a0), abs(a1)) * max(abs(b0), abs(b1))
    checked.require_range(-bound, bound, np.dtype(np.int64))


def _matmul(_: Op, inputs: Inputs) -> list[Array]:
    a, b = present(inputs)
    return [checked.fit(batched(a.astype(np.int64), b.astype(np.int64)), a.dtype)]


def _matmul_integer(_: Op, inputs: Inputs) -> list[Array]:
    a, b, a_zero, b_zero = (*inputs, None, None)[:4]
    assert a is not None and b is not None
    return [checked.fit(batched(centered(a, a_zero, -2), centered(b, b_zero, -1)), INT32)]


def batched(a: Array, b: Array) -> Array:
    """numpy.matmul in int64."""
    if b.ndim == 2 and a.ndim >= 2:
        return product(a.reshape(-1, a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[-1])
    if a.ndim < 2 or b.ndim < 2:
        require_product(a, b)
        return np.asarray(np.matmul(a, b))
    require_product(a, b)
    return np.einsum("...mk,...kn->...mn", a, b)


LINEAR: dict[str, Kernel] = {
    "ConvInteger": _conv_integer,
    "MatMulInteger": _matmul_integer,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
}
