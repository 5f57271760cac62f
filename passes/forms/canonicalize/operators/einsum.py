"""Einsum as a matrix product between transpositions: linear layers, products of attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.ir.ops import is_const, str_attr
from qcompile.ir.shapes import dims, rank
from qcompile.passes.forms.canonicalize.operators.writer import Kept, Writer

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class _Operand:
    """A tensor and a letter for each of its axes."""

    value: ir.Value
    axes: str

    def size(self, letter: str) -> int | None:
        """The length of an axis, if it is known."""
        found = (dims(self.value) or (None,) * len(self.axes))[self.axes.index(letter)]
        return found if isinstance(found, int) else None


def einsum(w: Writer) -> None:
    """Two operands, each letter once in each, at least one summed over."""
    terms, out = _equation(w)
    if len(terms) != 2:
        raise Kept(f"it has {len(terms)} operands")
    a, b = (_summed(w, _Operand(w.require(i, "operand"), t), terms[1 - i] + out) for i, t in enumerate(terms))
    if is_const(a.value) and not is_const(b.value):
        a, b = b, a
    shared = [x for x in a.axes if x in b.axes]
    batch, inner = "".join(x for x in shared if x in out), "".join(x for x in shared if x not in out)
    if not inner:
        raise Kept("it sums over nothing")
    rows, columns = ("".join(x for x in one.axes if x not in shared) for one in (a, b))
    left, right = _matrix(w, a, batch, rows, inner, keep=not batch), _matrix(w, b, batch, inner, columns, keep=False)
    y = _unfold(w, w("MatMul", left, right), batch, (a, rows, not batch), (b, columns, False))
    w.finish(_ordered(w, y, batch + rows + columns, out))


def _equation(w: Writer) -> tuple[list[str], str]:
    """A string of letters for each operand and for the output; the axes of an ellipsis get letters of their own."""
    text = str_attr(w.node, "equation", "").replace(" ", "")
    left, arrow, out = text.partition("->")
    terms, free = left.split(","), [x for x in _LETTERS if x not in text]
    if not arrow:
        letters = sorted(x for x in set(left) - set(",.") if left.count(x) == 1)
        out = ("..." if "..." in left else "") + "".join(letters)
    if "..." in left:
        counts = [_ellipsis(w, i, t) for i, t in enumerate(terms)]
        hidden = free[: max(counts)]
        terms = [t.replace("...", "".join(hidden[len(hidden) - n :])) for t, n in zip(terms, counts, strict=True)]
        out = out.replace("...", "".join(hidden))
    if any(len(set(t)) < len(t) for t in (*terms, out)):
        raise Kept("a letter stands twice in one operand")
    return terms, out


def _ellipsis(w: Writer, slot: int, term: str) -> int:
    if "..." not in term:
        return 0
    axes = rank(w.input(slot))
    if axes is None:
        raise Kept("the rank behind its ellipsis is not known")
    return axes - len(term.replace("...", ""))


def _summed(w: Writer, x: _Operand, elsewhere: str) -> _Operand:
    """Axes that nobody else has are summed first."""
    alone = [i for i, letter in enumerate(x.axes) if letter not in elsewhere]
    if not alone:
        return x
    left = "".join(letter for letter in x.axes if letter in elsewhere)
    return _Operand(w.axes("ReduceSum", x.value, *alone, keepdims=0), left)


def _ordered(w: Writer, value: ir.Value, axes: str, wanted: str) -> ir.Value:
    perm = [axes.index(x) for x in wanted]
    return value if perm == sorted(perm) else w("Transpose", value, perm=perm)


def _matrix(w: Writer, x: _Operand, batch: str, first: str, second: str, *, keep: bool) -> ir.Value:
    """[batch..., first, second], each of the two one axis; with `keep` the axes of `first` stay as they are."""
    value = _ordered(w, x.value, x.axes, batch + first + second)
    if (keep or len(first) == 1) and len(second) == 1:
        return value
    lead = [0] * (len(batch) + len(first)) if keep else [0] * len(batch) + [_product(x, first)]
    sizes = [*lead, _product(x, second)]
    if sizes.count(None) > 1:
        raise Kept("the sizes of axes that it joins are not static")
    return w.reshape(value, *(-1 if s is None else s for s in sizes))


def _product(x: _Operand, letters: str) -> int | None:
    sizes = [x.size(letter) for letter in letters]
    known = [s for s in sizes if s is not None]
    return int(np.prod(known, dtype=np.int64)) if len(known) == len(sizes) else None


def _unfold(w: Writer, y: ir.Value, batch: str, *ends: tuple[_Operand, str, bool]) -> ir.Value:
    """Give joined axes back; `ends` are the operand, its letters, and whether they were kept apart."""
    if all(kept or len(letters) == 1 for _, letters, kept in ends):
        return y
    sizes: list[int | None] = [0] * len(batch)
    for x, letters, kept in ends:
        at_front = kept or (len(letters) == 1 and len(sizes) == len(batch))
        sizes += [0] * len(letters) if at_front else [x.size(letter) for letter in letters]
    if sizes.count(None) > 1:
        raise Kept("the sizes of axes that it joins are not static")
    return w.reshape(y, *(-1 if s is None else s for s in sizes))
