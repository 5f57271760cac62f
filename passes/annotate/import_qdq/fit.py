"""Imported decisions brought to what the target and the scheme can hold."""

from __future__ import annotations

from dataclasses import replace as replace_spec

import onnx_ir as ir

from qcompile.decide.decisions import Use, quantizers, replace, undecide
from qcompile.decide.imports import limits, other_sign, over_range
from qcompile.decide.quantizer import Quantizer
from qcompile.pipeline.base import PassContext
from qcompile.quant.qtype import INT8, UINT8, QType
from qcompile.quant.spec import QuantSpec
from qcompile.target.specs import activation_spec


def fit(graph: ir.Graph, ctx: PassContext) -> None:
    """Keep, translate or drop every decision of `graph`; a remark wherever something else than the import comes of it."""
    for uses in quantizers(graph):
        free = [use for use in uses if (reason := ctx.selection.excluded(use.node)) is None or _drop([use], reason, ctx)]
        if free:
            _weight(free, ctx) if free[0].is_weight else _activation(free, ctx)
    if ctx.target.one_quantizer:
        _one_each(graph, ctx)


def _weight(uses: list[Use], ctx: PassContext) -> None:
    wanted, quantizer = ctx.scheme.weight, uses[0].quantizer
    if wanted is None:
        _drop(uses, f"{ctx.scheme.name} quantizes nothing: the import is undone", ctx)
        return
    shifts = any(not t.signed for t in ctx.target.weights)
    kept = _holdable(quantizer, wanted, ctx.target.weights, shifts=shifts)
    if kept is None:
        why = f"{_words(quantizer)} weights are not for {ctx.target.name} {ctx.scheme.name}: quantized anew"
        _drop(uses, why, ctx)
    elif kept is not quantizer:
        replace(uses, kept)
        ctx.remarks.note(
            str(uses[0].node.name), f"weight {uses[0].value.name} in {kept.spec.qtype.name} instead, the same numbers"
        )


def _activation(uses: list[Use], ctx: PassContext) -> None:
    wanted, quantizer, name = ctx.scheme.activation, uses[0].quantizer, uses[0].value.name
    if wanted is None:
        _drop(uses, f"{ctx.scheme.name} leaves activations in float: the import is undone", ctx)
        return
    kept = _holdable(quantizer, wanted, ctx.target.activations, shifts=not ctx.target.symmetric)
    if kept is quantizer:
        return
    if kept is not None:
        replace(uses, kept)
        ctx.remarks.note(str(uses[0].node.name), f"activation {name} in {kept.spec.qtype.name} instead, the same numbers")
        return
    made = over_range(quantizer, _spec(ctx))
    replace(uses, made)
    low, high = (float(x.min()) for x in limits(quantizer))
    text = f"activation {name}: {_words(quantizer)} is not for {ctx.target.name} {ctx.scheme.name}; its range in {_words(made)}"
    ctx.remarks.note(str(uses[0].node.name), text, lo=low, hi=high)


def _spec(ctx: PassContext) -> QuantSpec:
    """What the target's placement gives to activations, in the sign that it has."""
    spec, types = activation_spec(ctx.request()), {t.storage for t in ctx.target.activations}
    signed = spec.qtype.storage not in types and spec.qtype == UINT8
    return replace_spec(spec, qtype=INT8) if signed else spec


def _holdable(quantizer: Quantizer, wanted: QType, types: tuple[QType, ...], *, shifts: bool) -> Quantizer | None:
    """The quantizer, or one with the same numbers, if the types of the target and the scheme can hold one of the two.

    `shifts`: zero points may be other than 0.
    """
    both = [quantizer, *([other] if (other := other_sign(quantizer)) is not None else [])]
    return next((q for q in both if _fits(q, wanted, types, shifts)), None)


def _fits(quantizer: Quantizer, wanted: QType, types: tuple[QType, ...], shifts: bool) -> bool:
    kind = quantizer.spec.qtype
    stored = kind.storage in {t.storage for t in types} and kind.family == wanted.family and kind.bits <= wanted.bits
    return stored and (shifts or not quantizer.known.zero_point.any())


def _words(quantizer: Quantizer) -> str:
    shifted = " with a zero point" if quantizer.known.zero_point.any() else ""
    return f"{quantizer.spec.qtype.name}{shifted}"


def _drop(uses: list[Use], reason: str, ctx: PassContext) -> bool:
    for node, slot, _ in uses:
        undecide(node, slot)
        ctx.remarks.note(str(node.name), reason)
    return False


def _one_each(graph: ir.Graph, ctx: PassContext) -> None:
    """Readers with unequal quantizers of a tensor share the one with the widest range."""
    found: dict[ir.Value, list[list[Use]]] = {}
    for uses in quantizers(graph):
        if not uses[0].is_weight:
            found.setdefault(uses[0].value, []).append(uses)
    for value, groups in found.items():
        if len(groups) < 2:
            continue
        widest = max((uses[0].quantizer for uses in groups), key=lambda q: float(limits(q)[1].max()))
        for uses in groups:
            replace(uses, widest)
        why = f"{len(groups)} quantizers of {value.name} became one, the widest: {ctx.target.name} takes no more"
        ctx.remarks.note(str(groups[0][0].node.name), why)
