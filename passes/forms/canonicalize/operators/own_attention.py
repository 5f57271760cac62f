"""com.microsoft's MultiHeadAttention and Attention."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ir.ops import float_attr, int_attr, ints_attr
from qcompile.ir.shapes import dims, rank
from qcompile.passes.forms.canonicalize.operators.attend import (
    attend,
    default_scale,
    head_size,
    join_heads,
    known_rank,
    shaped,
    split_heads,
    with_past,
)
from qcompile.passes.forms.canonicalize.operators.masks import Mask, causal, shorter
from qcompile.passes.forms.canonicalize.operators.writer import Kept, Operand, Writer

_FILL = -10000.0


def multi_head(w: Writer) -> None:
    """MultiHeadAttention: projected q, k, v, of which k and v may have heads already; bias, masks, caches."""
    heads = int_attr(w.node, "num_heads", 0)
    q, key, value = (w.require(slot, name) for slot, name in enumerate(("query", "key", "value")))
    known_rank(q, (3,), "query")
    if any(w.input(slot) is not None for slot in (8, 9)):
        raise Kept("its cache is a buffer that it writes into")
    biases = _thirds(w, w.input(3), (head_size(q), head_size(q), head_size(value)))
    q, k, v = (_with_heads(w, x, bias, heads, name) for x, bias, name in zip((q, key, value), biases, "qkv", strict=True))
    past_key, past_value = w.input(6), w.input(7)
    keys, values = with_past(w, past_key, k), with_past(w, past_value, v)
    mask = _mask(w, w.input(4), w.input(5), q, keys, past_key)
    scale = float_attr(w.node, "scale", 0.0) or default_scale(head_size(q))
    done = attend(w, q, keys, values, scale, mask)
    w.finish(join_heads(w, done.output), keys, values, done.masked if w.used(3) else None)


def _thirds(w: Writer, bias: ir.Value | None, sizes: tuple[int | None, ...]) -> list[ir.Value | None]:
    """The biases of q, k and v, which stand behind each other."""
    if bias is None:
        return [None] * 3
    known = [s for s in sizes if s is not None]
    if len(known) < 3:
        raise Kept("the widths of its projections are not static")
    return list(w.parts(bias, 0, known))


def _with_heads(w: Writer, x: ir.Value, bias: ir.Value | None, heads: int, name: str) -> ir.Value:
    if known_rank(x, (3, 4), name) == 4:
        return x
    sizes = dims(x) or ()
    if bias is not None:
        x = shaped(w("Add", x, bias, name=f"{name}_bias"), x, *sizes)
    return split_heads(w, x, heads, name)


def own_attention(w: Writer) -> None:
    """com.microsoft's Attention: the projections with it, the cache one tensor [2, batch, heads, tokens, size]."""
    heads, x = int_attr(w.node, "num_heads", 0), w.require(0, "input")
    if int_attr(w.node, "do_rotary", 0) or w.input(6) is not None:
        raise Kept("its rotary embedding or its cache, a buffer that it writes into, has no plain spelling here")
    q, k, v = (split_heads(w, part, heads, name) for part, name in zip(_projected(w, x), "qkv", strict=True))
    pasts = _pasts(w)
    keys, values = with_past(w, pasts[0], k), with_past(w, pasts[1], v)
    mask = _mask(w, w.input(3), w.input(5), q, keys, pasts[0])
    scale = float_attr(w.node, "scale", 0.0) or default_scale(head_size(q))
    done = attend(w, q, keys, values, scale, mask)
    present = None
    if w.used(1):
        present = w("Concat", w.axes("Unsqueeze", keys, 0), w.axes("Unsqueeze", values, 0), axis=0, name="present")
    w.finish(join_heads(w, done.output), present)


def _projected(w: Writer, x: ir.Value) -> list[ir.Value]:
    """x W + b for q, k and v, each by a weight of its own."""
    weight, bias = w.require(1, "weights"), w.input(2)
    total = (dims(weight) or (None,))[-1]
    if not isinstance(total, int):
        raise Kept("the width of its weights is not static")
    sizes = ints_attr(w.node, "qkv_hidden_sizes") or (total // 3,) * 3
    biases = [None] * 3 if bias is None else w.parts(bias, 0, sizes)
    return [_linear(w, x, *each) for each in zip(w.parts(weight, 1, sizes), biases, sizes, strict=True)]


def _linear(w: Writer, x: ir.Value, weight: ir.Value, bias: ir.Value | None, width: int) -> ir.Value:
    y = w("MatMul", x, weight, name="projection")
    if bias is not None:
        y = w("Add", y, bias, name="projected")
    batch, tokens = (dims(x) or (None, None, None))[:2]
    return shaped(y, x, batch, tokens, width)


def _pasts(w: Writer) -> tuple[ir.Value | None, ir.Value | None]:
    past = w.input(4)
    if past is None:
        return None, None
    sizes = (dims(past) or (None,) * 5)[1:]
    key, value = (shaped(w("Gather", past, np.array(i, np.int64), axis=0), past, *sizes) for i in (0, 1))
    return key, value


def _mask(w: Writer, padding: ir.Value | None, bias: ir.Value | None, q: ir.Value, keys: ir.Value, past: ir.Value | None) -> Mask:
    """Padding gets a large negative number, so that no row is empty: one that sees nothing is a plain softmax."""
    out = Mask()
    if bias is not None:
        out.added.append(bias)
    if padding is not None:
        fill = float_attr(w.node, "mask_filter_value", _FILL)
        out.added.append(w("Where", _padding(w, padding, q, keys), 0.0, fill, name="padding"))
    if int_attr(w.node, "unidirectional", 0):
        offset: Operand = None if past is None else w.size(past, 2)
        if past is None and (dims(q) or (0,) * 4)[2] != (dims(keys) or (1,) * 4)[2]:
            raise Kept("it is causal over queries and keys of unlike length, which no other operator does as it does")
        out.allowed.append(causal(w, q, keys, offset))
    return out


def _padding(w: Writer, padding: ir.Value, q: ir.Value, keys: ir.Value) -> ir.Value:
    """[batch] lengths, [batch, keys] or [batch, queries, keys] of 0 and 1."""
    axes = rank(padding)
    if axes == 1:
        ours, batch = (dims(padding) or (None,))[0], (dims(q) or (None,) * 4)[0]
        if ours is None or ours != batch:
            raise Kept("its mask of one axis is not known to hold one length a sample")
        return shorter(w, keys, padding)
    seen = w("Cast", padding, to=ir.DataType.BOOL)
    if axes == 2:
        return w.axes("Unsqueeze", seen, 1, 2)
    if axes == 3:
        return w.axes("Unsqueeze", seen, 1)
    raise Kept("the rank of its mask is not known, or is more than 3")
