"""Apply the mechanical fixes of the rules until nothing more changes, and say what was fixed and what remains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from qcompile.target.catalog import TARGETS
from qcompile.target.check import check
from qcompile.target.findings import Context, Finding, Rule
from qcompile.target.fix_edits import prune
from qcompile.target.fix_graph import unique_names
from qcompile.target.view import GraphView

ROUNDS = 3  # a fix may bring up another rule's finding (float16 scales need opset 19)


@dataclass(frozen=True)
class Repaired:
    """The changed model, the findings that are gone, and those that remain (or came up)."""

    model: onnx.ModelProto
    fixed: list[Finding]
    remaining: list[Finding]


def repair(model: onnx.ModelProto, target: str, gpus: Sequence[str] = ()) -> Repaired:
    """Fix what is mechanical in a copy of `model` (with its weights loaded).

    Raises:
        UsageError: no such target.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    unnamed = [f for f in check(changed, target, gpus) if f.rule == "QC-TRT-016"]
    unique_names(_context(changed, target, gpus))
    before = check(changed, target, gpus)
    remaining = before
    for _ in range(ROUNDS):
        for rule in TARGETS[target].rules:
            _apply(rule, changed, target, gpus)
        last, remaining = remaining, check(changed, target, gpus)
        if _places(last) == _places(remaining):
            break
    left = Counter(_places(remaining))
    return Repaired(changed, [*unnamed, *(f for f in before if not left[f.rule, f.node])], remaining)


def _context(model: onnx.ModelProto, target: str, gpus: Sequence[str]) -> Context:
    return Context(GraphView(model), TARGETS[target], tuple(gpus))


def _apply(rule: Rule, model: onnx.ModelProto, target: str, gpus: Sequence[str]) -> None:
    if rule.repair is not None and rule.findings(_context(model, target, gpus)):
        rule.repair(_context(model, target, gpus))
        prune(model)


def _places(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    return sorted((f.rule, f.node) for f in findings)
