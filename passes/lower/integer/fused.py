"""Profile ort-fused: QLinearConv and QLinearMatMul where all readers of a layer want the same int8 codes.

Only the scales inside these operators are float; the tensors between them stay integer.  Every other layer keeps its strict form:
residual streams and norms read 16-bit codes, softmax its own, and QLinearMatMul has no bias.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.edit import add_constant
from qcompile.ir.ops import const_array, input_at, is_op
from qcompile.passes.lower.integer.context import Scene
from qcompile.passes.lower.integer.emit import INT8, INT32, Emitter, Fixed, Format
from qcompile.passes.lower.integer.requant import limits
from qcompile.target.integer.plan import Step

ROUNDING = "half_up; QLinearConv and QLinearMatMul: float32, half_even"
_FUSED = {"ConvInteger": "QLinearConv", "MatMulInteger": "QLinearMatMul"}
Scales = tuple[NDArray[np.float32], ...]


def fused(scene: Scene, step: Step, acc: Fixed) -> Fixed:
    """The accumulators of a layer as codes: clip(rint(float32(sum_k (a_k - z_a)(b_k - z_b) + bias) ((s_a s_b) / s)) + z).

    `acc` itself where readers want several formats or wider ones, a sum with its bias is not an int32 of one operator, or a
    scale vanishes in float32; the strict operators that are replaced die unread.
    """
    found = _layer(acc.value) if step.family in ("linear", "product") else None
    out = None if found is None else scene.shared_format(step.output)
    if found is None or out is None:
        return acc
    node, bias = found
    scales = _scales(scene, step, acc, out)
    if (bias is not None and not is_op(node, "ConvInteger")) or scales is None:
        return acc
    value = _emitted(scene.em, node, bias, scales, out)
    lo, hi = limits(out, scene.clamp_behind(step.output))
    if (lo, hi) != (-128, 127):
        value = scene.em.emit("Clip", [value, scene.em.const(lo, INT8), scene.em.const(hi, INT8)], INT8)
    return Fixed(value, np.asarray(out.scale), lo, hi, out.zero)


def _layer(value: ir.Value) -> tuple[ir.Node, ir.Value | None] | None:
    """The integer product behind an accumulator, and the int32 bias added to it."""
    node, bias = value.producer(), None
    if node is not None and is_op(node, "Add") and value.dtype == INT32:
        node, bias = (None if (v := node.inputs[0]) is None else v.producer()), node.inputs[1]
    return (node, bias) if node is not None and is_op(node, *_FUSED) else None


def _scales(scene: Scene, step: Step, acc: Fixed, out: Format) -> Scales | None:
    """Of both operands and the output in float32; None if one is not a positive number, or not one a channel."""
    first = scene.input_format(step.node, 0).scale
    found = tuple(np.asarray(s, np.float32) for s in (first, (acc.scale / first).reshape(-1), out.scale))
    weight = step.node.inputs[1]
    if found[1].size == 1:
        found = found[0], found[1].reshape(()), found[2]
    elif is_op(step.node, "MatMul") and weight is not None and weight.shape is not None and weight.shape.rank() != 2:
        return None
    return found if all(np.all(np.isfinite(s) & (s > 0)) for s in found) else None


def _emitted(em: Emitter, node: ir.Node, bias: ir.Value | None, scales: Scales, out: Format) -> ir.Value:
    inputs: list[ir.Value | None] = []
    for slot, scale in enumerate(scales[:2]):
        zero = const_array(input_at(node, slot + 2))
        inputs += [node.inputs[slot], _real(em, scale), em.const(np.full(scale.shape, 0 if zero is None else zero), INT8)]
    inputs += [_real(em, scales[2]), em.const(out.zero, INT8)]
    if bias is not None:
        flat = const_array(bias)
        assert flat is not None
        inputs.append(em.const(flat.reshape(-1), INT32))
    return em.emit(_FUSED[node.op_type], inputs, INT8, {key: a.value for key, a in node.attributes.items()})


def _real(em: Emitter, scale: NDArray[np.float32]) -> ir.Value:
    return add_constant(em.graph, f"{em.at}_scale", scale, ir.DataType.FLOAT)
