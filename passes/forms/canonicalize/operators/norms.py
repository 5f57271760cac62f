"""Norms that add a residual first, and those that ONNX has not in the model's opset."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.ir.ops import float_attr, int_attr
from qcompile.passes.forms.canonicalize.operators.masks import positions
from qcompile.passes.forms.canonicalize.operators.writer import Kept, Writer

_LAYER_NORM = 17
_SUM = 3


def layer_norm(w: Writer) -> None:
    """LayerNormalization in front of opset 17, as ONNX Runtime's optimizer writes it."""
    _only_first(w, 2)
    _over_last(w)
    w.finish(_layer(w, w.require(0, "input"), w.require(1, "scale"), w.input(2), 1e-5))


def rms_norm(w: Writer) -> None:
    """SimplifiedLayerNormalization: x / sqrt(mean(x^2) + epsilon) gamma."""
    _only_first(w, 2)
    _over_last(w)
    w.finish(_rms(w, w.require(0, "input"), w.require(1, "scale"), 1e-5))


def skip_layer_norm(w: Writer) -> None:
    """LayerNorm of input + skip + bias; the sum is output 3."""
    total = _sum(w, w.require(0, "input"), w.require(1, "skip"), w.input(4))
    w.finish(_layer(w, total, w.require(2, "gamma"), w.input(3), 1e-12), None, None, total)


def skip_rms_norm(w: Writer) -> None:
    """RMSNorm of input + skip + bias; the sum is output 3."""
    total = _sum(w, w.require(0, "input"), w.require(1, "skip"), w.input(3))
    w.finish(_rms(w, total, w.require(2, "gamma"), 1e-12), None, None, total)


def embed_layer_norm(w: Writer) -> None:
    """LayerNorm of the embeddings of words, positions and, if there are any, segments; output 1 counts the words of a mask."""
    words, segments = w.require(0, "words"), w.input(1)
    at = w.input(8)
    total = w("Add", w("Gather", w.require(2, "word embedding"), words), _places(w, words, at), name="sum")
    if segments is not None:
        total = w("Add", total, w("Gather", w.require(4, "segment embedding"), segments), name="sum")
    mask = w.input(7)
    if mask is None and w.used(1):
        raise Kept("it makes a mask of nothing")
    count = w.axes("ReduceSum", mask, 1, keepdims=0) if mask is not None and w.used(1) else None
    w.finish(_layer(w, total, w.require(5, "gamma"), w.input(6), 1e-12), count, total)


def _places(w: Writer, words: ir.Value, at: ir.Value | None) -> ir.Value:
    table = w.require(3, "position embedding")
    return w("Gather", table, at if at is not None else positions(w, words, 1))


def _sum(w: Writer, x: ir.Value, skip: ir.Value, bias: ir.Value | None) -> ir.Value:
    _only_first(w, 3)
    if bias is not None:
        x = w("Add", x, bias, name="bias")
    return w("Add", x, skip, name="sum")


def _only_first(w: Writer, end: int) -> None:
    """Raises Kept: one of the outputs in front of `end` that training needs is read."""
    if any(w.used(i) for i in range(1, end)):
        raise Kept("its mean or deviation is read")


def _over_last(w: Writer) -> None:
    if int_attr(w.node, "axis", -1) != -1:
        shape = w.require(0, "input").shape
        if shape is None or int_attr(w.node, "axis", -1) != len(shape) - 1:
            raise Kept("it normalises over several axes, or over unknown ones")


def _layer(w: Writer, x: ir.Value, gamma: ir.Value, beta: ir.Value | None, default: float) -> ir.Value:
    eps = float_attr(w.node, "epsilon", default)
    if w.opset >= _LAYER_NORM:
        rest = [] if beta is None else [beta]
        return w("LayerNormalization", x, gamma, *rest, axis=-1, epsilon=eps, name="norm")
    d = w("Sub", x, w.axes("ReduceMean", x, -1, keepdims=1), name="centred")
    return _scaled(w, d, eps, gamma, beta)


def _rms(w: Writer, x: ir.Value, gamma: ir.Value, default: float) -> ir.Value:
    return _scaled(w, x, float_attr(w.node, "epsilon", default), gamma, None)


def _scaled(w: Writer, d: ir.Value, eps: float, gamma: ir.Value, beta: ir.Value | None) -> ir.Value:
    variance = w.axes("ReduceMean", w("Mul", d, d, name="square"), -1, keepdims=1)
    y = w("Div", d, w("Sqrt", w("Add", variance, eps)))
    y = w("Mul", y, gamma, name="scaled")
    return y if beta is None else w("Add", y, beta, name="norm")
