"""Rotary position embeddings."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ir.ops import float_attr, int_attr
from qcompile.ir.shapes import dims
from qcompile.passes.forms.canonicalize.operators.attend import head_size, known_rank
from qcompile.passes.forms.canonicalize.operators.masks import positions
from qcompile.passes.forms.canonicalize.operators.writer import Kept, Writer


def rotary(w: Writer) -> None:
    """RotaryEmbedding of opset 23: caches [positions, size / 2] with position_ids, or [batch, tokens, size / 2] without."""
    cos, sin, at = w.require(1, "cosines"), w.require(2, "sines"), w.input(3)
    if at is not None:
        cos, sin = w("Gather", cos, at), w("Gather", sin, at)
    _embed(w, cos, sin, head_size(w.input(1)))


def own_rotary(w: Writer) -> None:
    """com.microsoft's RotaryEmbedding: position_ids come second, one number among them is where the tokens begin."""
    x, at, cos, sin = (w.require(slot, name) for slot, name in enumerate(("input", "position_ids", "cosines", "sines")))
    if float_attr(w.node, "scale", 1.0) != 1 or int_attr(w.node, "is_packed_batching", 0):
        raise Kept("its scale or its packed form has no plain spelling here")
    if known_rank(at, (1, 2), "position_ids") == 1:
        at = w.axes("Unsqueeze", w("Add", positions(w, x, 1 if known_rank(x, (3, 4), "input") == 3 else 2), at), 0)
    _embed(w, w("Gather", cos, at), w("Gather", sin, at), head_size(w.input(2)))


def _embed(w: Writer, cos: ir.Value, sin: ir.Value, half: int | None) -> None:
    x, heads = w.require(0, "input"), int_attr(w.node, "num_heads", 0)
    half = int_attr(w.node, "rotary_embedding_dim", 0) // 2 or half
    if not half:
        raise Kept("the length of its caches is not static")
    interleaved = bool(int_attr(w.node, "interleaved", 0))
    if known_rank(x, (3, 4), "input") == 4:
        return w.finish(rotate(w, x, cos, sin, half, interleaved, heads_first=True))
    width = (dims(x) or (None,))[-1]
    size = width // heads if heads and isinstance(width, int) else 2 * half
    y = rotate(w, w.reshape(x, 0, 0, heads or -1, size if not heads else -1), cos, sin, half, interleaved, heads_first=False)
    return w.finish(w.reshape(y, 0, 0, -1, name="joined"))


def rotate(w: Writer, x: ir.Value, cos: ir.Value, sin: ir.Value, half: int, interleaved: bool, *, heads_first: bool) -> ir.Value:
    """Pairs (a, b) of channels to (a c - b s, b c + a s); channels beyond 2 `half` stay.

    x is [batch, heads, tokens, size], or [batch, tokens, heads, size] unless `heads_first`; cos and sin [batch, tokens, half].
    """
    axis = 1 if heads_first else 2
    c, s = w.axes("Unsqueeze", cos, axis), w.axes("Unsqueeze", sin, axis)
    a, b = _pairs(w, x, half, interleaved)
    real = w("Sub", w("Mul", a, c), w("Mul", b, s))
    imaginary = w("Add", w("Mul", b, c), w("Mul", a, s))
    if interleaved:
        both = w("Concat", w.axes("Unsqueeze", real, -1), w.axes("Unsqueeze", imaginary, -1), axis=-1)
        ends = [w.reshape(both, 0, 0, 0, 2 * half)]
    else:
        ends = [real, imaginary]
    if _beyond(w, x, half):
        ends.append(w.slice(x, -1, 2 * half, np.iinfo(np.int64).max))
    return w("Concat", *ends, axis=-1, name="rotated") if len(ends) > 1 else ends[0]


def _beyond(w: Writer, x: ir.Value, half: int) -> bool:
    """Whether channels are left: only where the operator says how many it turns."""
    return int_attr(w.node, "rotary_embedding_dim", 0) > 0 or (head_size(x) or 2 * half) > 2 * half


def _pairs(w: Writer, x: ir.Value, half: int, interleaved: bool) -> tuple[ir.Value, ir.Value]:
    if not interleaved:
        return w.slice(x, -1, 0, half), w.slice(x, -1, half, 2 * half)
    end, axis, step = (np.array([i], np.int64) for i in (2 * half, -1, 2))
    first, second = (w("Slice", x, np.array([i], np.int64), end, axis, step) for i in (0, 1))
    return first, second
