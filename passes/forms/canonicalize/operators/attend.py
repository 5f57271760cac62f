"""softmax(scale q k^T + mask) v of heads, in plain operators: what every attention operator comes down to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.ir.shapes import dims, rank
from qcompile.passes.forms.canonicalize.operators.masks import Mask, sink_column
from qcompile.passes.forms.canonicalize.operators.writer import Kept, Operand, Writer


@dataclass(frozen=True)
class Attended:
    """The output [batch, heads, queries, size]; the scores in front of softcap and behind it; behind the mask; the softmax."""

    output: ir.Value
    scores: tuple[ir.Value, ir.Value]
    masked: ir.Value
    probabilities: ir.Value


def split_heads(w: Writer, x: ir.Value, heads: int, name: str) -> ir.Value:
    """[batch, tokens, heads * size] -> [batch, heads, tokens, size]."""
    y = w("Transpose", w.reshape(x, 0, 0, heads, -1, name=f"{name}_heads"), perm=[0, 2, 1, 3], name=f"{name}_t")
    batch, tokens, _ = dims(x) or (None, None, None)
    return shaped(y, x, batch, heads, tokens, head_size(x, heads))


def join_heads(w: Writer, x: ir.Value) -> ir.Value:
    """[batch, heads, tokens, size] -> [batch, tokens, heads * size]."""
    return w.reshape(w("Transpose", x, perm=[0, 2, 1, 3], name="tokens"), 0, 0, -1, name="joined")


def repeat_heads(w: Writer, x: ir.Value, times: int) -> ir.Value:
    """Each head `times` times in a row: [batch, heads, tokens, size] -> [batch, heads * times, tokens, size]."""
    if times == 1:
        return x
    heads = (dims(x) or (None, None))[1]
    if not isinstance(heads, int):
        raise Kept("its number of heads is not static")
    wide = w("Expand", w.axes("Unsqueeze", x, 2), np.array([1, 1, times, 1, 1], np.int64))
    return w.reshape(wide, 0, heads * times, -1, w.size(x, 3), name="repeated")


def with_past(w: Writer, past: ir.Value | None, x: ir.Value) -> ir.Value:
    """The cache in front of new keys or values, along the tokens."""
    if past is None:
        return x
    y = w("Concat", past, x, axis=2, name="cache")
    batch, heads, new, size = dims(x) or (None,) * 4
    old = (dims(past) or (None,) * 4)[2]
    return shaped(y, x, batch, heads, old + new if isinstance(old, int) and isinstance(new, int) else None, size)


def shaped(value: ir.Value, like: ir.Value, *sizes: int | str | None) -> ir.Value:
    """`value`, known to be of these sizes and of the type of `like`."""
    value.type, value.shape = like.type, ir.Shape(sizes)
    return value


def head_size(x: ir.Value | None, heads: int = 1) -> int | None:
    """The length of the last axis over `heads`, None if it is not known."""
    size = (dims(x) or (None,))[-1]
    return size // heads if isinstance(size, int) else None


def default_scale(size: int | None) -> float:
    """1 / sqrt(size).

    Raises:
        Kept: the size is not known.
    """
    if not size:
        raise Kept("the head size is not static")
    return float(1.0 / np.sqrt(size))


def attend(
    w: Writer, q: ir.Value, k: ir.Value, v: ir.Value, scale: float, mask: Mask, cap: float = 0.0, sink: Operand = None
) -> Attended:
    """q, k, v are [batch, heads, tokens, size]; rows that see no key become 0 where the mask knows of any.

    A `sink` [heads] is the score of one more key: its key and its value are zeros, so that it only takes its part of the sum.
    """
    root = np.sqrt(abs(scale))
    column = None if sink is None else sink_column(w, sink, k)
    if column is not None:
        k, v = (_one_more(w, x) for x in (k, v))
    keys = w("Transpose", k, perm=[0, 1, 3, 2], name="kt")
    raw = w("MatMul", w("Mul", q, root, name="q"), w("Mul", keys, root * np.sign(scale), name="k"), name="scores")
    capped = w("Mul", w("Tanh", w("Div", raw, cap)), cap, name="capped") if cap else raw
    rows = mask.rows(w)
    bias = mask.bias(w, rows)
    bias = bias if column is None else mask.widened(w, bias, column)
    masked = capped if bias is None else w("Add", capped, bias, name="mask")
    p = w("Softmax", masked, axis=-1)
    y = w("MatMul", p, v, name="pv")
    if rows is not None:
        y = w("Where", rows, y, 0.0, name="kept")
    return Attended(y, (raw, capped), masked, p if rows is None else w("Where", rows, p, 0.0, name="shown"))


def _one_more(w: Writer, x: ir.Value) -> ir.Value:
    """Zeros for one more token."""
    return w("Pad", x, np.array([0, 0, 0, 0, 0, 0, 1, 0], np.int64), name="sink")


def known_rank(x: ir.Value, wanted: tuple[int, ...], what: str) -> int:
    """The rank of `x`.

    Raises:
        Kept: it is not known, or not one of `wanted`.
    """
    found = rank(x)
    if found not in wanted:
        raise Kept(f"the rank of its {what} is " + ("not known" if found is None else f"{found}"))
    return found
