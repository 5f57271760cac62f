"""Completion: insert the default provider of each fact that a pass or the target needs and nobody established."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompile.errors import UsageError
from qcompile.pipeline import registry
from qcompile.pipeline.base import Fact, Kind, Pass
from qcompile.quant.spec import Scheme
from qcompile.target.target import Target

PROVIDERS: dict[Fact, str] = {
    Fact.CANONICAL: "canonicalize",
    Fact.PADS_FOLDED: "fold-pad",
    Fact.BN_FOLDED: "fold-bn",
    Fact.DIMS_FOLDED: "fold-dims",
    Fact.STEM: "space-to-depth",
    Fact.GELU_ORDER: "gelu-order",
    Fact.OPSET: "opset",
    Fact.NORMS_FUSED: "fuse-norm",
    Fact.QKV_SPLIT: "split-qkv",
    Fact.BIAS_RANK: "bias-rank",
    Fact.DECIDED: "annotate",
    Fact.GELU_CODES: "compand-gelu",
    Fact.FITTED: "rtn",
    Fact.QUANTIZED: "insert-qdq",
    Fact.HALF: "fp16",
}


@dataclass(frozen=True)
class Plan:
    """The completed pipeline; `inserted[i]` tells whether the planner put pass i in."""

    passes: tuple[Pass, ...]
    inserted: tuple[bool, ...]


def final_facts(target: Target, scheme: Scheme) -> list[Fact]:
    """What must hold of the output, in the order in which it is established."""
    facts: list[Fact] = []
    if scheme.weight is not None:
        facts.append(Fact.QUANTIZED)
    if target.body(scheme) != "float32":
        facts.append(Fact.HALF)
    return facts


def complete(
    user: Sequence[Pass], target: Target, scheme: Scheme, *, exact: bool = False, held: frozenset[Fact] = frozenset()
) -> Plan:
    """Walk the user's passes and add what is missing; the user's passes never move.

    `held` are facts that the input model already has (a half-run pipeline continues).

    Raises:
        UsageError: a pass stands where its work would be undone or too late.
    """
    plan: list[tuple[Pass, bool]] = []
    facts = set(held)
    for p in user:
        if not exact:
            for fact in _ordered(p.required(target, scheme) - facts):
                _provide(fact, facts, plan, target, scheme)
        _append(p, facts, plan, inserted=False)
    if not exact:
        for fact in final_facts(target, scheme):
            if fact not in facts:
                _provide(fact, facts, plan, target, scheme)
    return Plan(tuple(p for p, _ in plan), tuple(i for _, i in plan))


def _ordered(facts: frozenset[Fact] | set[Fact]) -> list[Fact]:
    return [f for f in PROVIDERS if f in facts]


def _provide(fact: Fact, facts: set[Fact], plan: list[tuple[Pass, bool]], target: Target, scheme: Scheme) -> None:
    if fact in facts:
        return
    p = registry.provider(_provider(fact, target, scheme))
    for needed in _ordered(p.required(target, scheme) - facts):
        _provide(needed, facts, plan, target, scheme)
    _append(p, facts, plan, inserted=True)


def _provider(fact: Fact, target: Target, scheme: Scheme) -> str:
    if fact in (Fact.QUANTIZED, Fact.HALF):
        return target.lowering(scheme)[0 if fact is Fact.QUANTIZED else -1]
    return PROVIDERS[fact]


def _append(p: Pass, facts: set[Fact], plan: list[tuple[Pass, bool]], *, inserted: bool) -> None:
    if Fact.QUANTIZED in facts and p.kind is not Kind.LOWER:
        raise UsageError(f"pass {p.name!r} stands behind the insertion of Q/DQ nodes, too late to work; move it to the front")
    if Fact.DECIDED in facts and p.kind is Kind.EQUIVALENT:
        raise UsageError(f"pass {p.name!r} rewrites the float graph and must stand before 'annotate'; move it to the front")
    facts -= p.invalidates
    facts |= p.establishes
    plan.append((p, inserted))
