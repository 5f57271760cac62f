"""com.microsoft's GroupQueryAttention."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ir.ops import float_attr, int_attr, str_attr
from qcompile.ir.shapes import dims
from qcompile.passes.forms.canonicalize.operators.attend import (
    attend,
    default_scale,
    head_size,
    join_heads,
    known_rank,
    repeat_heads,
    shaped,
    split_heads,
    with_past,
)
from qcompile.passes.forms.canonicalize.operators.masks import Mask, causal, positions
from qcompile.passes.forms.canonicalize.operators.rotary import rotate
from qcompile.passes.forms.canonicalize.operators.writer import Kept, Operand, Writer

_NO_FORM = ("qk_output", "sliding_window_cache")
_PAST_KEY, _PAST_VALUE, _COS, _SIN, _AT, _BIAS, _SINK, _KEY_SCALE, _VALUE_SCALE, _LAST = 3, 4, 7, 8, 9, 10, 11, 12, 13, 14


def grouped(w: Writer) -> None:
    """Causal, with a window, softcap, rotary embedding and a cache to which the new keys are appended.

    Sequences of one batch are taken to be equally long, without padding, and the cache to be as long as what it holds:
    `seqlens_k` and `total_sequence_length` then say nothing new.  A cache of 8-bit codes stays one: new keys are rounded.
    """
    _require_plain(w)
    w.assumes = ", for batches of sequences of one length and caches that hold no more than was seen"
    heads, groups = int_attr(w.node, "num_heads", 0), int_attr(w.node, "kv_num_heads", 0)
    q, k, v = (
        split_heads(w, x, n, name)
        for x, n, name in zip(_projections(w, heads, groups), (heads, groups, groups), "qkv", strict=True)
    )
    past = w.input(_PAST_KEY)
    offset: Operand = None if past is None else w.size(past, 2)
    if int_attr(w.node, "do_rotary", 0):
        q, k = _rotated(w, q, k, offset)
    present_key, keys = _cached(w, past, k, _KEY_SCALE)
    present_value, values = _cached(w, w.input(_PAST_VALUE), v, _VALUE_SCALE)
    mask = Mask(added=[b for b in (w.input(_BIAS),) if b is not None])
    if int_attr(w.node, "causal", 1):
        mask.allowed.append(causal(w, q, keys, offset, int_attr(w.node, "local_window_size", -1)))
    scale = float_attr(w.node, "scale", 0.0) or default_scale(head_size(q))
    times = heads // groups
    wide_keys, wide_values = repeat_heads(w, keys, times), repeat_heads(w, values, times)
    done = attend(w, q, wide_keys, wide_values, scale, mask, float_attr(w.node, "softcap", 0.0), _sink(w, heads))
    w.finish(join_heads(w, done.output), present_key, present_value)


def _sink(w: Writer, heads: int) -> Operand:
    """The score of a key that every query sees and that adds nothing but its part of the sum; one a head."""
    given = w.input(_SINK)
    return np.zeros(heads) if given is None and int_attr(w.node, "smooth_softmax", 0) > 0 else given


def _cached(w: Writer, past: ir.Value | None, x: ir.Value, scale_slot: int) -> tuple[ir.Value, ir.Value]:
    """The cache with `x` [batch, heads, tokens, size] behind it, and what it stands for: 8-bit codes are round(x / scale)."""
    scale = w.input(scale_slot)
    if scale is None:
        whole = with_past(w, past, x)
        return whole, whole
    _, heads, _, size = dims(x) or (None,) * 4
    per_channel = str_attr(w.node, "k_quant_type" if scale_slot == _KEY_SCALE else "v_quant_type", "NONE") == "PER_CHANNEL"
    channels = (1, 1, 1, 1)
    if per_channel:
        if not (isinstance(heads, int) and isinstance(size, int)):
            raise Kept("the number of channels of its quantized cache is not static")
        channels = (1, heads, 1, size)
    unit = w.reshape(scale, *channels)
    rounded = w("Clip", w("Round", w("Div", x, unit)), -128.0, 127.0)
    codes = shaped(w("Cast", rounded, to=ir.DataType.INT8, name="codes"), x, *(dims(x) or ()))
    codes.type = ir.TensorType(ir.DataType.INT8)
    whole = with_past(w, past, codes)
    return whole, shaped(w("Mul", w("Cast", whole, to=w.dtype), unit, name="decoded"), x, *(dims(whole) or ()))


def _require_plain(w: Writer) -> None:
    """Raises Kept: a form without a plain spelling here."""
    if any(w.input(slot) is not None for slot in range(_LAST, len(w.node.inputs))):
        raise Kept("it norms queries and keys itself")
    if any(str(w.node.attributes[n].value) not in ("0", "-1") for n in _NO_FORM if n in w.node.attributes) or w.used(3):
        raise Kept("its scores are read, or its cache forgets what leaves the window")
    caches = [v for slot in (_PAST_KEY, _PAST_VALUE) if (v := w.input(slot)) is not None]
    coded = w.input(_KEY_SCALE) is not None
    if int_attr(w.node, "kv_cache_bit_width", 8) == 4 or any((v.dtype == ir.DataType.INT8) is not coded for v in caches):
        raise Kept("its cache holds other codes than int8")


def _projections(w: Writer, heads: int, groups: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Query, key and value [batch, tokens, width]; they may be packed in the first input."""
    x, key, value = w.require(0, "query"), w.input(1), w.input(2)
    if key is not None and value is not None:
        for each in (x, key, value):
            known_rank(each, (3,), "projections")
        return x, key, value
    size = head_size(x, heads + 2 * groups)
    if size is None:
        raise Kept("its packed projections have no static width")
    batch, tokens = (dims(x) or (None, None, None))[:2]
    sizes = (heads * size, groups * size, groups * size)
    q, k, v = (shaped(y, x, batch, tokens, n) for y, n in zip(w.parts(x, -1, sizes), sizes, strict=True))
    return q, k, v


def _rotated(w: Writer, q: ir.Value, k: ir.Value, offset: Operand) -> tuple[ir.Value, ir.Value]:
    cos, sin, at = w.require(_COS, "cosines"), w.require(_SIN, "sines"), w.input(_AT)
    half = head_size(cos)
    if half is None:
        raise Kept("the length of its caches is not static")
    if at is None:
        at = positions(w, q, 2)
        at = w.axes("Unsqueeze", at if offset is None else w("Add", at, offset), 0)
    rows = w("Gather", cos, at), w("Gather", sin, at)
    interleaved = bool(int_attr(w.node, "rotary_interleaved", 0))
    first, second = (shaped(rotate(w, x, *rows, half, interleaved, heads_first=True), x, *(dims(x) or ())) for x in (q, k))
    return first, second
