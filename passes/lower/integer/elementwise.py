"""Adds, scalings, clamps and tables in integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.errors import ModelError
from qcompile.ir.ops import const_array, float_attr, is_op, str_attr
from qcompile.passes.lower.integer.context import Scene, clamp_bounds, narrowed
from qcompile.passes.lower.integer.emit import INT8, INT16, INT32, INT64, UNBOUNDED, Fixed, Format
from qcompile.passes.lower.integer.linear import INT32_LIMIT, with_constant
from qcompile.passes.lower.integer.requant import ANY_INT64, clamped, clip, codes, rounded_sum
from qcompile.target.integer.plan import Step, constant_operand, entry, is_bias

_Array = NDArray[np.float64]
_COARSEST = 0.25


def add(scene: Scene, step: Step) -> Fixed:
    """A sum of two tensors: both multiplied onto one exponent, rounded once."""
    first, second = (scene.em.read(v) for v in step.node.inputs[:2])
    if is_op(step.node, "Sub"):
        second = clamped(scene.em, second)
        second = replace(second, scale=-second.scale)
    return rounded_sum(scene.em, [first, second], None, scene.stored_format(step.output), scene.clamp_behind(step.output))


def offset(scene: Scene, step: Step) -> Fixed:
    """A tensor plus a constant: in the accumulators if it is a bias, else rounded into the output's format."""
    node, found = step.node, constant_operand(step.node)
    assert found is not None
    array, slot = found
    source = scene.em.read(node.inputs[1 - slot])
    constant = array.astype(np.float64)
    if is_op(node, "Sub"):
        constant = constant if slot == 0 else -constant
        source = source if slot == 1 else _negated(scene, source)
    if is_bias(scene.plan, node):
        return with_constant(scene.em, clamped(scene.em, source), constant)
    return rounded_sum(scene.em, [source], constant, scene.stored_format(step.output), scene.clamp_behind(step.output))


def _negated(scene: Scene, source: Fixed) -> Fixed:
    free = clamped(scene.em, source)
    return replace(free, scale=-free.scale)


def scale(scene: Scene, step: Step) -> Fixed:
    """A product with a constant costs nothing: the scale takes it."""
    node, found = step.node, constant_operand(step.node)
    assert found is not None
    factor = found[0].astype(np.float64)
    if is_op(node, "Div"):
        if np.any(factor == 0):
            raise ModelError(f"{node.name}: it divides by 0; correct the model")
        factor = 1.0 / factor
    source = scene.em.read(node.inputs[1 - found[1]])
    if source.clamp != UNBOUNDED and not (factor.size == 1 and factor.reshape(-1)[0] > 0):
        source = clamped(scene.em, source)
    if np.any(factor == 0):
        source, factor = _silenced(scene, clamped(scene.em, source), factor)
    return source.times(factor.reshape(()) if factor.size == 1 else factor)


def _silenced(scene: Scene, source: Fixed, factor: _Array) -> tuple[Fixed, _Array]:
    """Integers set to 0 where the factor is 0, which gets the size of the others: what is added there later needs a unit."""
    em, alive = scene.em, factor != 0
    dtype = INT64 if source.value.dtype == INT64 else INT32
    value = em.emit("Mul", [_centred(scene, source, dtype), em.const(alive, dtype)], dtype)
    unit = float(np.abs(factor[alive]).mean()) if alive.any() else 1.0
    reach = source.magnitude
    return Fixed(value, source.scale, -reach, reach), np.where(alive, factor, unit)


def multiply(scene: Scene, step: Step) -> Fixed:
    """The product of two tensors, exact: scales multiply."""
    em = scene.em
    a, b = (clamped(em, em.read(v)) for v in step.node.inputs[:2])
    bound = a.magnitude * b.magnitude
    if bound >= 1 << 46:
        raise ModelError(f"{step.node.name}: the product of its operands needs more than 46 bits; use --target ort")
    dtype = INT32 if bound <= INT32_LIMIT else INT64
    centred = [_centred(scene, t, dtype) for t in (a, b)]
    squared = step.node.inputs[0] is step.node.inputs[1]
    return Fixed(em.emit("Mul", centred, dtype), a.scale * b.scale, 0 if squared else -bound, bound)


def _centred(scene: Scene, term: Fixed, dtype: ir.DataType) -> ir.Value:
    wide = scene.em.cast(term.value, dtype)
    return scene.em.emit("Sub", [wide, scene.em.const(term.zero, dtype)], dtype) if term.zero else wide


def clamp(scene: Scene, step: Step) -> Fixed:
    """Relu or Clip: codes already end there, or the next rounding does it."""
    bounds = clamp_bounds(step.node)
    source = scene.em.read(step.node.inputs[0])
    if source.is_stored() and source.clamp == UNBOUNDED and _inside(source, bounds):
        return source
    return narrowed(source, bounds)


def _inside(source: Fixed, bounds: tuple[float, float]) -> bool:
    unit = float(source.scale.reshape(-1)[0])
    low, high = ((c - source.zero) * unit for c in (source.lo, source.hi))
    return low >= bounds[0] - 0.5 * unit and high <= bounds[1] + 0.5 * unit


def from_int(scene: Scene, step: Step) -> Fixed:
    """Cast of integers (masks, positions) to numbers: the integers themselves, saturated to twice the calibrated range."""
    source, em = step.node.inputs[0], scene.em
    assert source is not None
    if source.dtype == ir.DataType.BOOL:
        return Fixed(em.cast(source, INT32), np.asarray(1.0), 0, 1)
    wide = em.cast(source, INT64)
    fmt = scene.stored_format(step.output)
    low, high = math.ceil((fmt.lo - fmt.zero) * fmt.scale - 1e-3), math.floor((fmt.hi - fmt.zero) * fmt.scale + 1e-3)
    clipped = clip(em, wide, low, high, ANY_INT64)
    em.ctx.remarks.note(em.at, f"integers cast to numbers are saturated to {low}..{high}, twice what calibration saw")
    return Fixed(em.cast(clipped, INT32), np.asarray(1.0), low, high)


def where(scene: Scene, step: Step) -> Fixed:
    """Where(condition, a, b): both as codes of the output's format."""
    fmt, em = scene.stored_format(step.output), scene.em
    sides = [_side(scene, v, fmt) for v in step.node.inputs[1:3]]
    return Fixed(em.emit("Where", [step.node.inputs[0], *sides], fmt.dtype), np.asarray(fmt.scale), fmt.lo, fmt.hi, fmt.zero)


def extreme(scene: Scene, step: Step) -> Fixed:
    """Max or Min of tensors: all as codes of the output's format, which have the order of the numbers."""
    fmt, em, op = scene.stored_format(step.output), scene.em, step.node.op_type
    sides = [_side(scene, v, fmt) for v in step.node.inputs]
    value = em.emit(op, [em.cast(side, INT32) for side in sides], INT32)
    return Fixed(em.cast(value, fmt.dtype), np.asarray(fmt.scale), fmt.lo, fmt.hi, fmt.zero)


def _side(scene: Scene, value: ir.Value | None, fmt: Format) -> ir.Value:
    array = const_array(value)
    if array is not None:
        return scene.em.const(fmt.code(np.nan_to_num(array.astype(np.float64))), fmt.dtype)
    return codes(scene.em, value, fmt).value


# ---- tables -------------------------------------------------------------------------------------------------------


def table(scene: Scene, step: Step) -> Fixed:
    """Any function of one tensor: 256 answers, looked up by code.

    Raises:
        ModelError: one code stands for so much of a sine's period that its answers say nothing.
    """
    em = scene.em
    fmt = scene.input_format(*entry(step))
    if fmt.scale > _COARSEST and any(is_op(n, "Sin", "Cos") for n in step.nodes):
        raise ModelError(f"{step.node.name}: one of 256 codes stands for {fmt.scale:.3g} rad; compute it outside of the model")
    x = codes(em, step.source, fmt)
    index = em.emit("Add", [em.cast(x.value, INT64), em.const(128, INT64)], INT64)
    reals = (np.arange(-128, 128, dtype=np.float64) - fmt.zero) * fmt.scale
    out = scene.stored_format(step.output)
    bounds = scene.clamp_behind(step.output)
    answers = out.code(np.clip(_evaluate(step, reals), *bounds))
    narrow = INT8 if out.dtype == INT8 else INT16 if out.lo >= -(1 << 15) and out.hi < 1 << 15 else INT32
    value = em.emit("Gather", [em.const(answers, narrow), index], narrow, {"axis": 0})
    return Fixed(value, np.asarray(out.scale), int(answers.min()), int(answers.max()), out.zero)


def _evaluate(step: Step, x: _Array) -> _Array:
    """The step as a function of its source, in float64 at compile time.

    Raises:
        ModelError: the function is not finite on its calibrated range.
    """
    known: dict[ir.Value, _Array] = {} if step.source is None else {step.source: x}
    with np.errstate(all="ignore"):
        for node in step.nodes:
            arguments = [known[v] if v in known else _constant(v, node) for v in node.inputs if v is not None]
            known[node.outputs[0]] = np.asarray(_apply(node, arguments), np.float64)
    y = known[step.output]
    if not np.isfinite(y).all():
        raise ModelError(f"{step.node.name}: {step.node.op_type} is not finite on the range of its input; use --target ort")
    return y


def _constant(value: ir.Value, node: ir.Node) -> _Array:
    array = const_array(value)
    if array is None or array.size != 1:
        raise ModelError(f"{node.name}: it needs one table a channel; use --target ort")
    return array.astype(np.float64).reshape(())


def _apply(node: ir.Node, a: list[_Array]) -> Any:
    if node.op_type in _PLAIN:
        return _PLAIN[node.op_type](*a)
    return _WITH_ATTRIBUTES[node.op_type](node, *a)


def _erf(x: _Array) -> _Array:
    return np.array([math.erf(v) for v in np.ravel(x)]).reshape(np.shape(x))


def _sigmoid(x: _Array) -> _Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _gelu(node: ir.Node, x: _Array) -> _Array:
    if node.op_type == "FastGelu" or str_attr(node, "approximate", "none") == "tanh":
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + _erf(x / np.sqrt(2)))


def _hard_sigmoid(node: ir.Node, x: _Array) -> _Array:
    return np.clip(float_attr(node, "alpha", 0.2) * x + float_attr(node, "beta", 0.5), 0, 1)


_PLAIN: dict[str, Callable[..., Any]] = {
    "Abs": np.abs, "Add": np.add, "Cos": np.cos, "Div": np.divide, "Erf": _erf, "Exp": np.exp, "Log": np.log,
    "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1), "Mish": lambda x: x * np.tanh(np.logaddexp(0, x)), "Mul": np.multiply,
    "Neg": np.negative, "Pow": np.power, "Reciprocal": np.reciprocal, "Sigmoid": _sigmoid, "Sin": np.sin,
    "Softplus": lambda x: np.logaddexp(0, x), "Softsign": lambda x: x / (1 + np.abs(x)), "Sqrt": np.sqrt, "Sub": np.subtract,
    "Tanh": np.tanh,
}  # fmt: skip
_WITH_ATTRIBUTES: dict[str, Callable[..., Any]] = {
    "Elu": lambda n, x: np.where(x > 0, x, float_attr(n, "alpha", 1.0) * np.expm1(np.minimum(x, 0))),
    "FastGelu": _gelu,
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "LeakyRelu": lambda n, x: np.where(x > 0, x, float_attr(n, "alpha", 0.01) * x),
    "QuickGelu": lambda n, x: x * _sigmoid(float_attr(n, "alpha", 1.702) * x),
    "Swish": lambda n, x: x * _sigmoid(float_attr(n, "alpha", 1.0) * x),
}
