"""Moving, joining and pooling codes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qcompile.errors import ModelError
from qcompile.ir.ops import const_array, input_at, int_attr, is_const, is_op, static_shape
from qcompile.passes.lower.integer.context import Scene
from qcompile.passes.lower.integer.emit import INT8, INT16, INT32, INT64, Fixed
from qcompile.passes.lower.integer.requant import ANY_INT64, clamped, clip, codes
from qcompile.target.integer.plan import Step
from qcompile.target.integer.refusals import reduced_axes

_LONGEST = 1 << 16
_POOL_ATTRIBUTES = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")


def move(scene: Scene, step: Step) -> Fixed:
    """The same operator on codes; accumulators are rounded to their readers' format first, padding becomes a code."""
    node, em = step.node, scene.em
    source = _movable(scene, node)
    if source.value.dtype == INT16 and is_op(node, "Pad", "Resize"):
        source = replace(source, value=em.cast(source.value, INT32))
    inputs: list[ir.Value | None] = [source.value, *node.inputs[1:]]
    if is_op(node, "Pad"):
        inputs = _pad_inputs(scene, node, source)
    if is_op(node, "Gather"):
        inputs[1] = _within(scene, node)
    attributes = {k: a.value for k, a in node.attributes.items()}
    first = em.emit(node.op_type, inputs, source.value.dtype or INT32, attributes, outputs=len(node.outputs))
    made = first.producer()
    assert made is not None
    for old, new in zip(node.outputs, made.outputs, strict=True):
        em.fixed[old] = replace(source, value=new)
    return em.fixed[node.outputs[0]]


def _movable(scene: Scene, node: ir.Node) -> Fixed:
    """The moved tensor with one scale."""
    value = node.inputs[0]
    assert value is not None
    source = scene.em.read(value)
    if is_const(value):
        return source
    if source.is_stored():
        return clamped(scene.em, source)
    return codes(scene.em, value, scene.stored_format(value))


def _within(scene: Scene, node: ir.Node) -> ir.Value | None:
    """The index, held to the table where it is computed: the float model does not run beyond it either, and the proof asks."""
    index, shape = node.inputs[1], static_shape(node.inputs[0])
    length = None if shape is None else shape[int_attr(node, "axis", 0)]
    if index is None or length is None or is_const(index) or index.producer() is None:
        return index
    return clip(scene.em, scene.em.cast(index, INT64), -length, length - 1, ANY_INT64)


def _pad_inputs(scene: Scene, node: ir.Node, source: Fixed) -> list[ir.Value | None]:
    given = const_array(input_at(node, 2)) if input_at(node, 2) is not None else None
    real = 0.0 if given is None or given.size == 0 else float(given.reshape(-1)[0])
    unit = float(source.scale.reshape(-1)[0])
    code = int(np.clip(np.rint(np.clip(real / unit, -(2.0**30), 2.0**30)) + source.zero, source.lo, source.hi))
    dtype = source.value.dtype or INT32
    return [source.value, node.inputs[1], scene.em.const(code, dtype), *node.inputs[3:]]


def concat(scene: Scene, step: Step) -> Fixed:
    """All parts as codes of the joint format."""
    fmt, em = scene.stored_format(step.output), scene.em
    parts = [codes(em, v, fmt).value for v in step.node.inputs]
    value = em.emit("Concat", parts, fmt.dtype, {"axis": int_attr(step.node, "axis", 0)})
    return Fixed(value, np.asarray(fmt.scale), fmt.lo, fmt.hi, fmt.zero)


def max_pool(scene: Scene, step: Step) -> Fixed:
    """The largest code is the code of the largest (and the least that of the least): the format passes through."""
    node, em = step.node, scene.em
    x = codes(em, node.inputs[0], scene.input_format(node, 0))
    if is_op(node, "MaxPool"):
        attributes = {k: node.attributes[k].value for k in _POOL_ATTRIBUTES if k in node.attributes}
        return replace(x, value=em.emit("MaxPool", [x.value], INT8, attributes))
    shape, keep = static_shape(node.inputs[0]), 1 if is_op(node, "GlobalMaxPool") else int_attr(node, "keepdims", 1)
    axes = reduced_axes(node, len(shape or ()))
    op = "ReduceMin" if is_op(node, "ReduceMin") else "ReduceMax"
    return replace(x, value=em.emit(op, [x.value, em.const(np.asarray(axes), INT64)], INT8, {"keepdims": keep}))


def average_pool(scene: Scene, step: Step) -> Fixed:
    """Sums over the window, by a depthwise ConvInteger with ones (padding is the zero point); 1/n goes into the scale."""
    node, em = step.node, scene.em
    x = codes(em, node.inputs[0], scene.input_format(node, 0))
    kernel = [int(k) for k in node.attributes["kernel_shape"].as_ints()]
    shape = static_shape(node.inputs[0])
    assert shape is not None and shape[1] is not None
    channels = shape[1]
    ones, count = np.ones((channels, 1, *kernel), np.int8), math.prod(kernel)
    attributes = {k: node.attributes[k].value for k in _POOL_ATTRIBUTES if k in node.attributes and k != "ceil_mode"}
    zero = [em.const(x.zero, INT8)] if x.zero else []
    value = em.emit("ConvInteger", [x.value, em.const(ones, INT8), *zero], INT32, attributes | {"group": channels})
    bound = count * x.magnitude
    return Fixed(value, x.scale / count, -bound, bound)


def reduce_sum(scene: Scene, step: Step) -> Fixed:
    """Mean or sum over whole axes: one exact integer sum; 1/n goes into the scale."""
    node, em = step.node, scene.em
    source = clamped(em, em.read(node.inputs[0]))
    shape = static_shape(node.inputs[0])
    assert shape is not None
    axes = reduced_axes(node, len(shape))
    assert axes is not None
    count = math.prod(shape[a] or _LONGEST for a in axes)
    if not all(shape[a] for a in axes):
        em.ctx.remarks.note(em.at, f"an axis of unknown length is taken to have at most {_LONGEST} elements")
    if not source.is_scalar and any(_varies(source, len(shape), a) for a in axes):
        raise ModelError(f"{node.name}: its input has one scale a channel of a reduced axis; use --target ort")
    dtype = INT32 if max(abs(source.lo), abs(source.hi)) * count < 1 << 31 else INT64
    keep = 1 if is_op(node, "GlobalAveragePool") else int_attr(node, "keepdims", 1)
    wide = em.cast(source.value, dtype)
    if source.zero:
        wide = em.emit("Sub", [wide, em.const(source.zero, dtype)], dtype)
    value = em.emit("ReduceSum", [wide, em.const(np.asarray(axes), INT64)], dtype, {"keepdims": keep})
    divisor = 1 if is_op(node, "ReduceSum") else count
    unit = source.scale / divisor
    if not source.is_scalar and not keep:
        unit = unit.reshape([d for i, d in enumerate((1,) * (len(shape) - unit.ndim) + unit.shape) if i not in axes])
    low, high = (count * (edge - source.zero) for edge in (source.lo, source.hi))
    return Fixed(value, unit, min(low, 0), max(high, 0))


def _varies(source: Fixed, rank: int, axis: int) -> bool:
    index = axis - (rank - source.scale.ndim)
    return index >= 0 and source.scale.shape[index] != 1
