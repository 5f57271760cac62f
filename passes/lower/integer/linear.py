"""Integer convolutions and matrix products: int8 codes in, int32 accumulators out, biases at the accumulators' scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.decide.decisions import decision
from qcompile.errors import ModelError
from qcompile.ir.ops import const_array, float_attr, input_at, int_attr, is_op
from qcompile.passes.lower.integer.context import Scene
from qcompile.passes.lower.integer.emit import INT4, INT8, INT32, INT64, Emitter, Fixed, Reals
from qcompile.passes.lower.integer.requant import codes
from qcompile.target.integer.plan import Step

INT32_LIMIT = (1 << 31) - 1
_DEAD_UNIT = 2.0**-15
_CONV_ATTRIBUTES = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def linear(scene: Scene, step: Step) -> Fixed:
    """Conv, Gemm or MatMul with a constant weight: sum_k (x_k - z_x) w_kc + round(b_c / (s_x s_c)), scale s_x s_c."""
    node, em = step.node, scene.em
    fmt = scene.input_format(node, 0)
    x = codes(em, node.inputs[0], fmt)
    weight, scale = _weight(node)
    value = _product(em, node, x, weight)
    per_channel = scale.reshape((1, -1) + (1,) * (weight.ndim - 2)) if is_op(node, "Conv") else scale
    alpha = float_attr(node, "alpha", 1.0) if is_op(node, "Gemm") else 1.0
    axes = tuple(range(1, weight.ndim)) if is_op(node, "Conv") else (0,)
    bound = int(np.abs(weight.astype(np.int64)).sum(axes).max(initial=0)) * max(abs(x.lo - x.zero), abs(x.hi - x.zero))
    _require_int32(node, bound)
    out = Fixed(value, per_channel * fmt.scale * alpha, -bound, bound)
    bias = const_array(input_at(node, 2))
    if bias is None:
        return out
    beta = float_attr(node, "beta", 1.0) if is_op(node, "Gemm") else 1.0
    shaped = bias.astype(np.float64) * beta
    return with_constant(em, out, shaped.reshape(per_channel.shape) if is_op(node, "Conv") else shaped)


def _weight(node: ir.Node) -> tuple[NDArray[np.int8], Reals]:
    """Codes as the integer operator wants them, and one scale a channel."""
    d, array = decision(node, 1), const_array(node.inputs[1])
    if d is None or d.qparams is None or array is None:
        raise ModelError(f"the weight of {node.name!r} has no scale; run annotate and rtn for --target integer first")
    quantized = d.coded(array.astype(np.float32)).astype(np.int8)
    if is_op(node, "Gemm") and int_attr(node, "transB", 0):
        quantized = np.ascontiguousarray(quantized.T)
    scale = d.qparams.scale.astype(np.float32).astype(np.float64)
    axes = tuple(range(1, quantized.ndim)) if is_op(node, "Conv") else (0,)
    return quantized, _with_units(scale, np.asarray(quantized.any(axes)))


def _with_units(scale: Reals, alive: NDArray[np.bool_]) -> Reals:
    """Channels whose codes are all 0 take a finer scale, the mean of the others': a bias is all they make, and it needs a unit.

    2^-15 of their own at least, so that a bias that `rtn` keeps below 2^29 units stays below 2^44.
    """
    mean = float(np.broadcast_to(scale, alive.shape)[alive].mean()) if alive.any() else 0.0
    return np.where(alive, scale, np.minimum(scale, np.maximum(mean, scale * _DEAD_UNIT)))


def _product(em: Emitter, node: ir.Node, x: Fixed, weight: NDArray[np.int8]) -> ir.Value:
    inputs: list[ir.Value | None] = [x.value, _stored(em, node, weight), *_zero_points(em, x)]
    if not is_op(node, "Conv"):
        return em.emit("MatMulInteger", inputs, INT32)
    attributes: dict[str, Any] = {k: node.attributes[k].value for k in _CONV_ATTRIBUTES if k in node.attributes}
    return em.emit("ConvInteger", inputs, INT32, attributes)


def _stored(em: Emitter, node: ir.Node, weight: NDArray[np.int8]) -> ir.Value:
    """The weight as an initializer: two codes a byte up to 4 bits, widened by a Cast (the products read int8 only)."""
    d = decision(node, 1)
    if d is None or d.spec.qtype.bits > INT4.bitwidth:
        return em.const(weight, INT8)
    return em.cast(em.const(weight, INT4), INT8)


def _zero_points(em: Emitter, *terms: Fixed) -> list[ir.Value | None]:
    if not any(t.zero for t in terms):
        return []
    return [em.const(t.zero, INT8) for t in terms]


def _require_int32(node: ir.Node, bound: int) -> None:
    if bound > INT32_LIMIT:
        raise ModelError(
            f"{node.name}: its sum can reach {bound:.3g}, beyond int32; split the layer's input channels, or use --target ort"
        )


def product(scene: Scene, step: Step) -> Fixed:
    """MatMul of two activations: both as int8 codes, their zero points inside the operator."""
    node, em = step.node, scene.em
    a, b = (codes(em, node.inputs[i], scene.input_format(node, i)) for i in (0, 1))
    value = em.emit("MatMulInteger", [a.value, b.value, *_zero_points(em, a, b)], INT32)
    bound = _length(node) * a.magnitude * b.magnitude
    _require_int32(node, bound)
    return Fixed(value, a.scale * b.scale, -bound, bound)


def _length(node: ir.Node) -> int:
    """The reduction length; an unknown one is taken as 32768, the longest that cannot overflow int32."""
    for value, axis in ((node.inputs[0], -1), (node.inputs[1], -2)):
        shape = value.shape if value is not None else None
        if shape is not None and isinstance(shape[axis], int):
            return int(shape[axis])  # type: ignore[arg-type]
    return (1 << 31) // (255 * 255) - 1


def with_constant(em: Emitter, acc: Fixed, constant: Reals) -> Fixed:
    """acc + round(constant / scale) in the accumulators' own integers; int64 where int32 could overflow."""
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(constant == 0, 0.0, constant / acc.scale)
    if np.abs(steps).max(initial=0.0) >= 2.0**45:
        raise ModelError(f"{em.at}: a constant is 2^45 times as large as the layer's unit; check the weights for dead channels")
    added = np.rint(steps).astype(np.int64)
    reach = acc.magnitude + abs(acc.zero) + int(np.abs(added).max(initial=0))
    dtype = INT32 if reach <= INT32_LIMIT and acc.value.dtype != INT64 else INT64
    value = em.emit("Add", [em.cast(acc.value, dtype), em.const(added, dtype)], dtype)
    low, high = (int(edge + extreme) for edge, extreme in ((acc.lo, added.min(initial=0)), (acc.hi, added.max(initial=0))))
    return Fixed(value, acc.scale, low, high, acc.zero)
