"""GELU in ONNX Runtime's spellings."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ir.ops import float_attr, str_attr
from qcompile.passes.forms.canonicalize.operators.writer import Writer

_TANH = float(np.sqrt(2 / np.pi))


def gelu(w: Writer) -> None:
    """Gelu, and BiasGelu, which adds a bias first: x (1 + erf(x / sqrt 2)) / 2."""
    x = _biased(w)
    if str_attr(w.node, "approximate", "none") == "tanh":
        return w.finish(_tanh(w, x))
    bell = w("Add", w("Erf", w("Div", x, float(np.sqrt(2)))), 1.0)
    return w.finish(w("Mul", w("Mul", x, bell), 0.5, name="gelu"))


def fast_gelu(w: Writer) -> None:
    """FastGelu: x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, a bias added first where it has one."""
    w.finish(_tanh(w, _biased(w)))


def quick_gelu(w: Writer) -> None:
    """QuickGelu: x sigmoid(alpha x)."""
    x = w.require(0, "input")
    w.finish(w("Mul", x, w("Sigmoid", w("Mul", x, float_attr(w.node, "alpha", 1.702))), name="gelu"))


def _biased(w: Writer) -> ir.Value:
    x, bias = w.require(0, "input"), w.input(1)
    return x if bias is None else w("Add", x, bias, name="bias")


def _tanh(w: Writer, x: ir.Value) -> ir.Value:
    cubic = w("Add", w("Mul", w("Mul", x, 0.044715), x), 1.0)
    bell = w("Add", w("Tanh", w("Mul", w("Mul", x, _TANH), cubic)), 1.0)
    return w("Mul", w("Mul", x, 0.5), bell, name="gelu")
