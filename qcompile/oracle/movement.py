"""Operators that move, repeat or reduce elements, with the semantics of ONNX."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper

from qcompile.errors import ModelError
from qcompile.oracle import checked
from qcompile.oracle.elementwise import Inputs, Kernel, present
from qcompile.oracle.graph import Op

Array = NDArray[Any]


def _ints(array: Array | None) -> list[int] | None:
    return None if array is None else [int(v) for v in array.reshape(-1)]


def _at(inputs: Inputs, slot: int) -> Array | None:
    return inputs[slot] if slot < len(inputs) else None


def _data(inputs: Inputs) -> Array:
    return present(inputs)[0]


# ---- movement -----------------------------------------------------------------------------------------------------


def _identity(_: Op, inputs: Inputs) -> list[Array]:
    return [_data(inputs)]


def _concat(op: Op, inputs: Inputs) -> list[Array]:
    return [np.concatenate(present(inputs), axis=int(op.attributes["axis"]))]


def target_shape(shape: tuple[int, ...], wanted: list[int], allow_zero: bool) -> list[int]:
    """Reshape's target with 0 (keep this axis) replaced."""
    return [shape[i] if d == 0 and not allow_zero else d for i, d in enumerate(wanted)]


def _reshape(op: Op, inputs: Inputs) -> list[Array]:
    x, wanted = _data(inputs), _ints(inputs[1])
    assert wanted is not None
    return [x.reshape(target_shape(x.shape, wanted, bool(op.attributes.get("allowzero", 0))))]


def _flatten(op: Op, inputs: Inputs) -> list[Array]:
    x, axis = _data(inputs), int(op.attributes.get("axis", 1))
    axis += x.ndim if axis < 0 else 0
    return [x.reshape(int(np.prod(x.shape[:axis], dtype=np.int64)), -1)]


def _transpose(op: Op, inputs: Inputs) -> list[Array]:
    return [np.transpose(_data(inputs), op.attributes.get("perm"))]


def _slice(_: Op, inputs: Inputs) -> list[Array]:
    x = _data(inputs)
    return [x[slices(x.ndim, *(_ints(_at(inputs, i)) for i in (1, 2, 3, 4)))]]


def slices(
    rank: int, starts: list[int] | None, ends: list[int] | None, axes: list[int] | None, steps: list[int] | None
) -> tuple[slice, ...]:
    """Python slices of an ONNX Slice; a backward one that ends before the first element has no Python end."""
    assert starts is not None and ends is not None
    made = [slice(None)] * rank
    for i, (axis, start, end) in enumerate(zip(axes or range(len(starts)), starts, ends, strict=True)):
        step = steps[i] if steps else 1
        made[axis] = slice(start, None if step < 0 and end < -(1 << 30) else end, step)
    return tuple(made)


def _split(op: Op, inputs: Inputs) -> list[Array]:
    x, axis = _data(inputs), int(op.attributes.get("axis", 0))
    sizes = _ints(_at(inputs, 1)) or split_sizes(x.shape[axis], len(op.outputs))
    return list(np.split(x, np.cumsum(sizes)[:-1].tolist(), axis=axis))


def split_sizes(length: int, parts: int) -> list[int]:
    """Equal parts, the last one smaller."""
    size = -(-length // parts)
    return [min(size, length - i * size) for i in range(parts)]


def _squeeze(_: Op, inputs: Inputs) -> list[Array]:
    axes = _ints(_at(inputs, 1))
    return [np.squeeze(_data(inputs), axis=None if axes is None else tuple(axes))]


def _unsqueeze(_: Op, inputs: Inputs) -> list[Array]:
    return [np.expand_dims(_data(inputs), tuple(_ints(inputs[1]) or ()))]


def _expand(_: Op, inputs: Inputs) -> list[Array]:
    x, shape = _data(inputs), _ints(inputs[1])
    assert shape is not None
    return [np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(shape))).copy()]


def _tile(_: Op, inputs: Inputs) -> list[Array]:
    repeats = _ints(inputs[1])
    assert repeats is not None
    return [np.tile(_data(inputs), repeats)]


def pad_widths(op: Op, inputs: Inputs) -> list[tuple[int, int]]:
    """(before, after) of each axis of a Pad."""
    rank, pads, axes = _data(inputs).ndim, _ints(inputs[1]), _ints(_at(inputs, 3))
    assert pads is not None
    widths, half = [(0, 0)] * rank, len(pads) // 2
    for i, axis in enumerate(axes if axes is not None else range(rank)):
        widths[axis] = (pads[i], pads[half + i])
    return widths


def _pad(op: Op, inputs: Inputs) -> list[Array]:
    x, value = _data(inputs), _at(inputs, 2)
    widths, mode = pad_widths(op, inputs), op.attributes.get("mode", "constant")
    inner = tuple(slice(max(-b, 0), n - max(-a, 0)) for n, (b, a) in zip(x.shape, widths, strict=True))
    grown = [(max(b, 0), max(a, 0)) for b, a in widths]
    if mode == "constant":
        fill = 0 if value is None else int(value.reshape(()))
        return [np.pad(x[inner], grown, constant_values=fill)]
    if mode not in ("edge", "reflect", "wrap"):
        raise ModelError(f"{op}: Pad mode {mode!r} is not in the integer oracle; use constant, edge, reflect or wrap")
    return [np.pad(x[inner], grown, mode=mode)]


def _gather(op: Op, inputs: Inputs) -> list[Array]:
    x, indices = present(inputs)
    axis = int(op.attributes.get("axis", 0))
    _require_entries(indices, x.shape[axis])
    return [np.take(x, indices, axis=axis)]


def _gather_elements(op: Op, inputs: Inputs) -> list[Array]:
    x, indices = present(inputs)
    axis = int(op.attributes.get("axis", 0))
    _require_entries(indices, x.shape[axis])
    part = tuple(slice(None) if i == axis % x.ndim else slice(n) for i, n in enumerate(indices.shape))
    return [np.take_along_axis(x[part], indices, axis)]


def _require_entries(indices: Array, length: int) -> None:
    """Raises Overflow: an index outside -length .. length - 1."""
    low, high = checked.extent(indices)
    if low < -length or high >= length:
        raise checked.Overflow(f"an index {low if low < -length else high} into {length} entries")


def _depth_to_space(op: Op, inputs: Inputs) -> list[Array]:
    x, size = _data(inputs), int(op.attributes["blocksize"])
    n, c, h, w = x.shape
    if op.attributes.get("mode", "DCR") == "DCR":
        parts = x.reshape(n, size, size, c // size**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(n, c // size**2, size, size, h, w).transpose(0, 1, 4, 2, 5, 3)
    return [parts.reshape(n, c // size**2, h * size, w * size)]


def _shape(op: Op, inputs: Inputs) -> list[Array]:
    start, end = op.attributes.get("start", 0), op.attributes.get("end")
    return [np.array(_data(inputs).shape[start:end], np.int64)]


def _constant_of_shape(op: Op, inputs: Inputs) -> list[Array]:
    shape, value = _ints(inputs[0]), op.attributes.get("value")
    assert shape is not None
    fill = np.zeros((), np.float32) if value is None else numpy_helper.to_array(value).reshape(())
    return [np.full(shape, fill)]


def _range(_: Op, inputs: Inputs) -> list[Array]:
    start, limit, step = present(inputs)
    return [np.arange(int(start), int(limit), int(step)).astype(start.dtype)]


def _resize(op: Op, inputs: Inputs) -> list[Array]:
    """Nearest neighbour with whole-numbered factors: each element is repeated."""
    x = _data(inputs)
    for axis, factor in enumerate(resize_factors(op, inputs)):
        x = np.repeat(x, factor, axis=axis)
    return [x]


def resize_factors(op: Op, inputs: Inputs) -> list[int]:
    """How often each element is repeated along each axis.

    Raises:
        ModelError: not nearest-neighbour upsampling by whole numbers with asymmetric or half-pixel coordinates.
    """
    shape = _data(inputs).shape
    factors = [1] * len(shape)
    for axis, new in _resized(op, inputs):
        factors[axis] = new // shape[axis] if shape[axis] and new % shape[axis] == 0 else 0
    if 0 in factors or not _repeats(op):
        raise ModelError(f"{op}: only nearest-neighbour upsampling by whole numbers is exact in integers; keep it in float")
    return factors


def _repeats(op: Op) -> bool:
    """Whether upsampling by whole numbers repeats elements."""
    coordinates = op.attributes.get("coordinate_transformation_mode", "half_pixel")
    floors = coordinates == "asymmetric" and op.attributes.get("nearest_mode", "round_prefer_floor") == "floor"
    return op.attributes.get("mode", "nearest") == "nearest" and (floors or coordinates.startswith("half_pixel"))


def _resized(op: Op, inputs: Inputs) -> list[tuple[int, int]]:
    """(axis, new size), from the sizes or from scales, which must be whole numbers."""
    shape, sizes, scales = _data(inputs).shape, _ints(_at(inputs, 3)), _at(inputs, 2)
    axes = list(op.attributes.get("axes", range(len(shape))))
    if sizes:
        return list(zip(axes, sizes, strict=True))
    given = [] if scales is None else scales.tolist()
    return [(axis, shape[axis] * int(s) if int(s) == s else 0) for axis, s in zip(axes, given, strict=True)]


# ---- reductions ---------------------------------------------------------------------------------------------------


def reduced_axes(op: Op, rank: int, axes: list[int] | None) -> tuple[int, ...]:
    """The axes that a reduction runs over, non-negative."""
    if not axes:
        return () if op.attributes.get("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted(a % rank for a in axes))


def _reduce_sum(op: Op, inputs: Inputs) -> list[Array]:
    x = _data(inputs)
    return [checked.total(x, reduced_axes(op, x.ndim, _ints(_at(inputs, 1))), bool(op.attributes.get("keepdims", 1)))]


def _extreme(name: Literal["max", "min"]) -> Kernel:
    def kernel(op: Op, inputs: Inputs) -> list[Array]:
        x = _data(inputs)
        axes = reduced_axes(op, x.ndim, _ints(_at(inputs, 1)))
        function = np.max if name == "max" else np.min
        return [np.asarray(function(x, axis=axes, keepdims=bool(op.attributes.get("keepdims", 1))))]

    return kernel


MOVEMENT: dict[str, Kernel] = {
    "Identity": _identity,
    "Concat": _concat,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "DepthToSpace": _depth_to_space,
    "Shape": _shape,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Resize": _resize,
}
REDUCTIONS: dict[str, Kernel] = {"ReduceSum": _reduce_sum, "ReduceMax": _extreme("max"), "ReduceMin": _extreme("min")}
