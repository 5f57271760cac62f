"""Attention of opset 23 and 24."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.ir.ops import float_attr, int_attr
from qcompile.ir.shapes import dims, rank
from qcompile.passes.forms.canonicalize.operators.attend import (
    Attended,
    attend,
    default_scale,
    head_size,
    join_heads,
    known_rank,
    repeat_heads,
    split_heads,
    with_past,
)
from qcompile.passes.forms.canonicalize.operators.masks import Mask, causal, shorter
from qcompile.passes.forms.canonicalize.operators.writer import Kept, Operand, Writer

_MASK, _PAST_KEY, _PAST_VALUE, _LENGTHS = 3, 4, 5, 6


def attention(w: Writer) -> None:
    """3-D and 4-D, grouped heads, causal, softcap, masks of both kinds, caches, lengths of external caches, outputs of scores."""
    q, k, v = (_heads(w, slot, name) for slot, name in enumerate(("q", "k", "v")))
    past_key, past_value = w.input(_PAST_KEY), w.input(_PAST_VALUE)
    keys, values = with_past(w, past_key, k), with_past(w, past_value, v)
    size = head_size(q)
    scale = float_attr(w.node, "scale", 0.0) or default_scale(size)
    times = _groups(q, k)
    mask = _mask(w, q, keys, past_key)
    done = attend(
        w, q, repeat_heads(w, keys, times), repeat_heads(w, values, times), scale, mask, float_attr(w.node, "softcap", 0.0)
    )
    y = join_heads(w, done.output) if rank(w.input(0)) == 3 else done.output
    w.finish(y, keys, values, _scores(w, done, mask) if w.used(3) else None)


def _heads(w: Writer, slot: int, name: str) -> ir.Value:
    x = w.require(slot, name)
    if known_rank(x, (3, 4), name) == 4:
        return x
    heads = int_attr(w.node, "kv_num_heads" if slot else "q_num_heads", 0)
    if not heads:
        raise Kept("its inputs are 3-D and it does not tell the number of heads")
    return split_heads(w, x, heads, name)


def _groups(q: ir.Value, k: ir.Value) -> int:
    ours, theirs = (dims(q) or (None, None))[1], (dims(k) or (None, None))[1]
    if ours == theirs and ours is not None:
        return 1
    if not isinstance(ours, int) or not isinstance(theirs, int):
        raise Kept("its number of heads is not static")
    return ours // theirs


def _mask(w: Writer, q: ir.Value, keys: ir.Value, past: ir.Value | None) -> Mask:
    out, given, lengths = Mask(), w.input(_MASK), w.input(_LENGTHS)
    if given is not None:
        (out.allowed if given.dtype == ir.DataType.BOOL else out.added).append(given)
        out.may_be_empty = True
    if lengths is not None:
        out.allowed.append(shorter(w, keys, lengths))
        out.may_be_empty = True
    if int_attr(w.node, "is_causal", 0):
        offset: Operand = None
        if past is not None:
            offset = w.size(past, 2)
        elif lengths is not None:
            offset = w("Sub", w.axes("Unsqueeze", lengths, 1, 2, 3), w.size(q, 2))
        out.allowed.append(causal(w, q, keys, offset))
    return out


def _scores(w: Writer, done: Attended, mask: Mask) -> ir.Value:
    """Behind the mask, -inf stands for keys that are not seen, in rows without a key too."""
    mode = int_attr(w.node, "qk_matmul_output_mode", 0)
    if mode < 2:
        return done.scores[mode]
    bias = mask.bias(w, None) if mode == 2 else None
    return done.probabilities if mode == 3 else done.scores[1] if bias is None else w("Add", done.scores[1], bias)
