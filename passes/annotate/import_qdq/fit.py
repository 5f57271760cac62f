"""Imported decisions brought to what the target and the scheme can hold."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.decide.decisions import Use, quantizers, replace, undecide
from qcompile.decide.imports import limits, other_sign, over_range
from qcompile.decide.quantizer import Quantizer
from qcompile.pipeline.base import PassContext
from qcompile.quant.blockformats import block_format
from qcompile.quant.qtype import INT8, UINT8, QType
from qcompile.quant.spec import QuantSpec
from qcompile.target.specs import activation_spec


@dataclass(frozen=True)
class _Room:
    """The codes that one kind of tensor may have: `types` of the target, those `wanted` by the scheme, zero points (`shifts`) or
    none, blocks of the format that the scheme names.
    """

    types: tuple[QType, ...]
    wanted: tuple[QType, ...]
    shifts: bool
    scheme: str

    def held(self, quantizer: Quantizer) -> Quantizer | None:
        """The quantizer, or one with the same numbers, whichever fits."""
        both = (quantizer, other_sign(quantizer))
        return next((q for q in both if q is not None and self._fits(q)), None)

    def _fits(self, quantizer: Quantizer) -> bool:
        kind, blocks = quantizer.spec.qtype, block_format(quantizer.spec)
        if blocks is not None:
            return blocks.name == self.scheme
        stored = any(t.storage == kind.storage for t in self.types)
        alike = any(kind.family == t.family and kind.bits <= t.bits for t in self.wanted)
        return stored and alike and (self.shifts or not quantizer.known.zero_point.any())


def fit(graph: ir.Graph, ctx: PassContext) -> None:
    """Keep, translate or drop every decision of `graph`; a remark wherever something else than the import comes of it."""
    for uses in quantizers(graph):
        free = [use for use in uses if not _excluded(use, ctx)]
        if free:
            _weight(free, ctx) if free[0].is_weight else _activation(free, ctx)
    if ctx.target.one_quantizer:
        _one_each(graph, ctx)


def _excluded(use: Use, ctx: PassContext) -> bool:
    reason = ctx.selection.excluded(use.node)
    if reason is not None:
        _drop([use], reason, ctx)
    return reason is not None


def _weight(uses: list[Use], ctx: PassContext) -> None:
    scheme, target, quantizer = ctx.scheme, ctx.target, uses[0].quantizer
    if scheme.weight is None:
        _drop(uses, f"{scheme.name} quantizes nothing: the import is undone", ctx)
        return
    room = _Room(target.weights, _wanted(scheme.weight, scheme.fallback), any(not t.signed for t in target.weights), scheme.name)
    kept = room.held(quantizer)
    if kept is None:
        _drop(uses, f"{_words(quantizer)} weights are not for {target.name} {scheme.name}: quantized anew", ctx)
    else:
        _keep(uses, kept, f"weight {uses[0].value.name}", ctx)


def _activation(uses: list[Use], ctx: PassContext) -> None:
    scheme, target, quantizer, name = ctx.scheme, ctx.target, uses[0].quantizer, f"activation {uses[0].value.name}"
    if scheme.activation is None:
        _drop(uses, f"{scheme.name} leaves activations in float: the import is undone", ctx)
        return
    room = _Room(target.activations, _wanted(scheme.activation, scheme.fallback), not target.symmetric, scheme.name)
    kept = room.held(quantizer)
    if kept is not None:
        _keep(uses, kept, name, ctx)
    elif block_format(quantizer.spec) is not None:
        _drop(uses, f"{name}: its scales were found at run time, its range is measured instead", ctx)
    else:
        _translate(uses, name, ctx)


def _wanted(kind: QType, fallback: QType | None) -> tuple[QType, ...]:
    return (kind,) if fallback is None else (kind, fallback)


def _keep(uses: list[Use], kept: Quantizer, what: str, ctx: PassContext) -> None:
    if kept is not uses[0].quantizer:
        replace(uses, kept)
        ctx.remarks.note(str(uses[0].node.name), f"{what} in {kept.spec.qtype.name} instead, the same numbers")


def _translate(uses: list[Use], what: str, ctx: PassContext) -> None:
    """The same range in the codes of the target."""
    quantizer, made = uses[0].quantizer, over_range(uses[0].quantizer, _spec(ctx))
    replace(uses, made)
    low, high = limits(quantizer)
    text = f"{what}: {_words(quantizer)} is not for {ctx.target.name} {ctx.scheme.name}; its range in {_words(made)}"
    ctx.remarks.note(str(uses[0].node.name), text, lo=float(low.min()), hi=float(high.max()))


def _spec(ctx: PassContext) -> QuantSpec:
    """What the target's placement gives to activations, in the sign that it has."""
    spec, types = activation_spec(ctx.request()), {t.storage for t in ctx.target.activations}
    return dataclasses.replace(spec, qtype=INT8) if spec.qtype == UINT8 and UINT8.storage not in types else spec


def _words(quantizer: Quantizer) -> str:
    shifted = " with a zero point" if quantizer.known.zero_point.any() else ""
    return f"{quantizer.spec.qtype.name}{shifted}"


def _drop(uses: list[Use], reason: str, ctx: PassContext) -> None:
    for node, slot, _ in uses:
        undecide(node, slot)
        ctx.remarks.note(str(node.name), reason)


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
