"""The two places where numbers become integers and integers numbers: QuantizeLinear at inputs, DequantizeLinear at outputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ir.edit import add_constant, redirect, swap_output
from qcompile.passes.lower.integer.context import Scene
from qcompile.passes.lower.integer.emit import INT8, INT16, INT32, Fixed, Format
from qcompile.passes.lower.integer.requant import clamped, codes
from qcompile.target.integer.plan import entrances, exits, is_border, is_float, leaves

_WIDEST = 1 << 30
_SHAPE_ONLY = Format(1.0, 0, -128, 127)
"""Of an input whose elements nothing reads."""


def quantize_inputs(scene: Scene) -> None:
    """One QuantizeLinear at each float input, behind the Cast of one that is not float32."""
    for value in list(entrances(scene.em.graph)):
        if is_float(value) and value.uses():
            scene.em.at = str(value.name)
            fmt = scene.stored_format(value) if any(leaves(scene.plan, value)) else _SHAPE_ONLY
            scene.em.fixed[value] = _quantized(scene, value, fmt)


def _quantized(scene: Scene, value: ir.Value, fmt: Format) -> Fixed:
    em = scene.em
    narrow = INT8 if fmt.dtype == INT8 else INT16
    scale = _float_constant(scene, np.asarray(fmt.scale))
    q = em.emit("QuantizeLinear", [value, scale, em.const(fmt.zero, narrow)], narrow)
    if fmt.lo > -128 or fmt.hi < 127:
        q = em.emit("Clip", [q, em.const(fmt.lo, narrow), em.const(fmt.hi, narrow)], narrow) if narrow == INT8 else q
    return Fixed(em.cast(q, fmt.dtype), np.asarray(fmt.scale), fmt.lo, fmt.hi, fmt.zero)


def dequantize_outputs(scene: Scene) -> None:
    """One DequantizeLinear at each float output: of codes, or of the last layer's int32 sums with a scale a channel; in front of
    the Cast of one that is not float32."""
    for old in dict.fromkeys(exits(scene.em.graph)):
        if old in scene.em.fixed:
            scene.em.at = str(old.name)
            made, casts = _dequantized(scene, old), [use for use in old.uses() if is_border(use[0])]
            redirect(old, made, casts)
            if old.is_graph_output():
                swap_output(scene.em.graph, old, made)


def _dequantized(scene: Scene, value: ir.Value) -> ir.Value:
    source = clamped(scene.em, scene.em.read(value))
    axis = _scale_axis(source, value)
    if source.magnitude >= 1 << 31 or (source.zero and source.value.dtype != INT8) or (source.scale.size > 1 and axis is None):
        source, axis = codes(scene.em, value, scene.decided_format(value) or _widest(source)), None
    source = _positive(scene, source)
    stored = source.value if source.value.dtype in (INT8, INT32) else scene.em.cast(source.value, INT32)
    scale = source.scale.reshape(-1) if axis is not None else source.scale.reshape(-1)[0]
    inputs: list[ir.Value | None] = [stored, _float_constant(scene, np.asarray(scale))]
    if source.zero:
        inputs.append(scene.em.const(source.zero, INT8))
    return scene.em.emit("DequantizeLinear", inputs, value.dtype or ir.DataType.FLOAT, {} if axis is None else {"axis": axis})


def _widest(source: Fixed) -> Format:
    """31 bits over everything that the integers can reach: a sum beyond int32 loses its last bits, and never saturates."""
    return Format(float(np.abs(source.scale).max()) * source.magnitude / _WIDEST, 0, -_WIDEST, _WIDEST)


def _positive(scene: Scene, source: Fixed) -> Fixed:
    """The same numbers with scales above 0 in float32, as DequantizeLinear's are: v s = (v sign(s)) |s|, v 0 = (v 0) 1."""
    sign = np.sign(source.scale.astype(np.float32)).astype(np.int64)
    if np.all(sign == 1):
        return source
    em, reach = scene.em, source.magnitude
    centred = em.cast(source.value, INT32)
    if source.zero:
        centred = em.emit("Sub", [centred, em.const(source.zero, INT32)], INT32)
    value = em.emit("Mul", [centred, em.const(sign, INT32)], INT32)
    return Fixed(value, np.where(sign == 0, 1.0, np.abs(source.scale)), -reach, reach)


def _scale_axis(source: Fixed, value: ir.Value) -> int | None:
    """The axis along which the scale varies, None if there is none or more than one."""
    if source.scale.size == 1 or value.shape is None:
        return None
    wide = [i for i, d in enumerate(source.scale.shape) if d != 1]
    return len(value.shape) - source.scale.ndim + wide[0] if len(wide) == 1 else None


def _float_constant(scene: Scene, array: np.ndarray) -> ir.Value:
    return add_constant(scene.em.graph, f"{scene.em.at}_scale", array.astype(np.float32), ir.DataType.FLOAT)
