"""Matrix products and convolutions with something fused to them by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from qcompile.ir.ops import const_array, float_attr, int_attr, str_attr
from qcompile.ir.shapes import rank
from qcompile.passes.forms.canonicalize.operators.writer import Kept, Writer

_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_GEMM = ("alpha", "beta", "transA", "transB")
_PLAIN = ("Relu", "Sigmoid", "Tanh", "Softsign", "Softplus")


def matmul(w: Writer) -> None:
    """FusedMatMul: alpha op(A) op(B)."""
    a, b = (_operand(w, slot, "AB"[slot]) for slot in (0, 1))
    alpha = float_attr(w.node, "alpha", 1.0)
    if alpha == 1:
        return w.finish(w("MatMul", a, b))
    if const_array(w.input(1)) is not None:
        return w.finish(w("MatMul", a, w("Mul", b, alpha, name="weight")))
    return w.finish(w("Mul", w("MatMul", a, b), alpha, name="scaled"))


def _operand(w: Writer, slot: int, letter: str) -> ir.Value:
    x = w.require(slot, letter)
    swaps, moves = int_attr(w.node, f"trans{letter}", 0), int_attr(w.node, f"transBatch{letter}", 0)
    axes = rank(x)
    if (not swaps and not moves) or axes == 1:
        return x
    if axes is None:
        raise Kept(f"the rank of {letter} is not known")
    perm = list(range(axes))
    if moves:
        perm = [*perm[1:-1], 0, perm[-1]]
    if swaps:
        perm[-2:] = perm[:-3:-1]
    return w("Transpose", x, perm=perm, name=letter.lower())


def conv(w: Writer) -> None:
    """FusedConv: a convolution, a residual that is added, an activation."""
    y = w("Conv", *w.node.inputs[:3], **_attributes(w, _CONV))
    rest = w.input(3)
    if rest is not None:
        y = w("Add", y, rest, name="sum")
    params = w.node.attributes.get("activation_params")
    w.finish(_activated(w, y, tuple(params.as_floats()) if params is not None else ()))


def gemm(w: Writer) -> None:
    """FusedGemm: a Gemm and an activation."""
    params = (float_attr(w.node, "activation_alpha", 0.0), float_attr(w.node, "activation_beta", 0.0))
    w.finish(_activated(w, w("Gemm", *w.node.inputs[:3], **_attributes(w, _GEMM)), params))


def _attributes(w: Writer, names: Sequence[str]) -> dict[str, Any]:
    return {n: w.node.attributes[n].value for n in names if n in w.node.attributes}


def _activated(w: Writer, x: ir.Value, params: Sequence[float]) -> ir.Value:
    kind = str_attr(w.node, "activation", "")
    if not kind:
        return x
    if kind in _PLAIN:
        return w(kind, x)
    if kind == "LeakyRelu":
        return w(kind, x, alpha=params[0])
    if kind == "Clip":
        return w(kind, x, params[0], params[1])
    if kind == "HardSigmoid":
        return w(kind, x, alpha=params[0], beta=params[1])
    raise Kept(f"its activation {kind} is not known")
