"""Which keys a query may see: masks of attention operators as one tensor that is added to the scores, and empty rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompile.ir.shapes import rank
from qcompile.passes.forms.canonicalize.operators.writer import Operand, Writer


@dataclass
class Mask:
    """`allowed`: True where a key is seen; `added`: added to the scores; all broadcast to [batch, heads, queries, keys].

    `may_be_empty`: a row may see no key.
    """

    allowed: list[ir.Value] = field(default_factory=list[ir.Value])
    added: list[ir.Value] = field(default_factory=list[ir.Value])
    may_be_empty: bool = False

    def rows(self, w: Writer) -> ir.Value | None:
        """[..., queries, 1], True for rows that see a key; None if all do.  Taken from the masks, never from the scores: those
        have one reader in a fused kernel."""
        if not self.may_be_empty:
            return None
        total = _sum(w, self.added)
        finite = [] if total is None else [w("Not", w("IsInf", total, detect_positive=0))]
        number = w("Cast", _all(w, [*self.allowed, *finite]), to=ir.DataType.INT32)
        most = w.axes("ReduceMax", number, -1, keepdims=1)
        return w("Greater", most, np.array(0, np.int32), name="rows")

    def bias(self, w: Writer, rows: ir.Value | None) -> ir.Value | None:
        """What is added to the scores, -inf where a key is not seen; 0 in rows without a key, so that none is NaN."""
        total = _sum(w, self.added)
        if self.allowed:
            seen = _all(w, self.allowed)
            if rows is not None and total is None:
                seen = w("Or", seen, w("Not", rows))
            total = w("Where", seen, 0.0 if total is None else total, -np.inf, name="bias")
        if rows is not None and self.added and total is not None:
            total = w("Where", rows, total, 0.0)
        return total

    def widened(self, w: Writer, bias: ir.Value | None, column: ir.Value) -> ir.Value:
        """`bias` with the `column` of one more key, which all rows see."""
        if bias is None:
            return column
        axes = max([2, *(rank(v) or 4 for v in self.added)])
        return w("Add", w("Pad", bias, np.array([0] * (2 * axes - 1) + [1], np.int64), name="wide"), column, name="bias_sink")


def sink_column(w: Writer, sink: Operand, keys: ir.Value) -> ir.Value:
    """[1, heads, 1, keys + 1]: `sink` [heads] in the last place, 0 before."""
    each = np.asarray(sink).reshape(1, -1, 1, 1) if not isinstance(sink, ir.Value) else w.reshape(sink, 1, -1, 1, 1)
    front, back = np.zeros(3, np.int64), np.zeros(4, np.int64)
    length = w.size(keys, 2)
    if isinstance(length, np.ndarray):
        return w("Pad", each, np.concatenate([front, length, back]), name="sinks")
    return w("Pad", each, w("Concat", front, length, back, axis=0), name="sinks")


def _sum(w: Writer, terms: list[ir.Value]) -> ir.Value | None:
    total: ir.Value | None = None
    for each in terms:
        total = each if total is None else w("Add", total, each)
    return total


def _all(w: Writer, tests: list[ir.Value]) -> ir.Value:
    result = tests[0]
    for test in tests[1:]:
        result = w("And", result, test)
    return result


def positions(w: Writer, value: ir.Value, axis: int) -> ir.Value:
    """0, 1, ... along an axis of `value`: int64 [length]."""
    length = w.size(value, axis)
    if isinstance(length, np.ndarray):
        return w.constant(np.arange(length[0], dtype=np.int64), "positions")
    return w("Range", np.array(0, np.int64), w.axes("Squeeze", length, 0), np.array(1, np.int64))


def causal(w: Writer, q: ir.Value, k: ir.Value, offset: Operand = None, window: int = 0) -> ir.Value:
    """Key j for query i if j <= i + offset, and j > i + offset - window where that is given; [queries, keys], or with the batch
    axes of `offset` in front.  q and k are [batch, heads, length, size]."""
    at = w.axes("Unsqueeze", positions(w, q, 2), 1)
    if offset is not None:
        at = w("Add", at, offset)
    keys = positions(w, k, 2)
    seen = w("Not", w("Greater", keys, at), name="causal")
    return seen if window <= 0 else w("And", seen, w("Greater", keys, w("Sub", at, np.array(window, np.int64))))


def shorter(w: Writer, k: ir.Value, lengths: ir.Value) -> ir.Value:
    """Key j of sample b if j < lengths[b]: [batch, 1, 1, keys]."""
    return w("Less", positions(w, k, 2), w.axes("Unsqueeze", w("Cast", lengths, to=ir.DataType.INT64), 1, 2, 3))
