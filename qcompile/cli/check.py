"""`qcompile check`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from qcompile.cli.options import MODEL, Command, as_json, options
from qcompile.cli.output import answer, flops, megabytes, print_json, print_table, print_text
from qcompile.errors import UsageError
from qcompile.verbs.check import Bound, Checked, CheckOptions, Cost, Finding, Proof, Rule, check_model, write_sarif
from qcompile.verbs.options import made

STDOUT = "-"
EXAMPLES = 2
TIGHTEST = 8


@click.command("check", cls=Command)
@click.argument("model", type=MODEL)
@options(CheckOptions)
@click.option("--sarif", metavar="FILE|-", help="Write the findings as SARIF 2.1.0 (- is standard output).")
@click.option("--proof", is_flag=True, help="Of an integer-only model: the bound and the margin of every node.")
@as_json
def command(model: Path, given: Mapping[str, Any], sarif: str | None, proof: bool, as_json: bool) -> None:
    """Check MODEL against a target's rules.

    Exit code 1 on errors (with --fix: on errors that remain): what the backend refuses, or silently runs in float.
    """
    if sarif == STDOUT and as_json:
        raise UsageError("--json and --sarif - both want standard output; give --sarif a file")
    checked = check_model(model, made(CheckOptions, given))
    _print(checked, checked.output or model, sarif, proof, as_json)
    if checked.errors:
        click.get_current_context().exit(1)


def _print(checked: Checked, model: Path, sarif: str | None, proof: bool, as_json: bool) -> None:
    if sarif is not None and sarif != STDOUT:
        write_sarif(checked, model, Path(sarif))
    if sarif == STDOUT:
        print_json(checked.to_sarif(model.name))
        return
    answer(checked, as_json, lambda c: show_checked(c, every_node=proof))


def show_checked(checked: Checked, *, every_node: bool) -> None:
    """The findings, and the proof of an integer-only model."""
    show_findings(checked)
    show_proof(checked, every_node=every_node)


def show_findings(checked: Checked) -> None:
    """Findings grouped by rule: id and title, the nodes with the reason, and what to do."""
    rules = {rule.id: rule for rule in checked.rules}
    for rule_id, found in _by_rule(checked.findings).items():
        rule = rules[rule_id]
        print_text(f"{rule.severity} {rule.id} {rule.title} ({len(found)}x)", *_examples(found))
        print_text(f"  what to do: {rule.fix}", *_about_fix(rule, checked))
    if checked.output is not None:
        _show_fixed(checked, rules)
    errors = len(checked.errors)
    if not checked.quantized:
        print_text(f"nothing in this model is quantized; to do it, type: qcompile MODEL --target {checked.target}")
    print_text(f"{errors} errors, {len(checked.findings) - errors} warnings for target {checked.target}")


def _by_rule(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    groups: dict[str, list[Finding]] = {}
    for f in findings:
        groups.setdefault(f.rule, []).append(f)
    return groups


def _examples(found: Sequence[Finding]) -> list[str]:
    lines = [f"  {f.node or '(model)'}: {f.message}" for f in found[:EXAMPLES]]
    more = len(found) - EXAMPLES
    return [*lines, f"  ... and {more} more (all of them: --json)"] if more > 0 else lines


def _about_fix(rule: Rule, checked: Checked) -> list[str]:
    """Whether --fix would do it, or why it did not."""
    if checked.output is None:
        return ["  --fix can do this"] if rule.repair is not None else []
    return [
        "  not fixed: the fix does not apply here" if rule.repair is not None else "  not fixed: this needs a decision of yours"
    ]


def _show_fixed(checked: Checked, rules: dict[str, Rule]) -> None:
    for rule_id, found in _by_rule(checked.fixed).items():
        nodes = ", ".join(f.node or "(model)" for f in found[:EXAMPLES])
        print_text(f"fixed {rule_id} {rules[rule_id].title} ({len(found)}x): {nodes}{', ...' if len(found) > EXAMPLES else ''}")
    print_text(f"output       {checked.output}")


def show_proof(checked: Checked, *, every_node: bool) -> None:
    """The overflow proof: how many nodes are bounded, what is assumed, and the nodes nearest to the end of their type."""
    if checked.proof is None:
        return
    proof, worst = checked.proof, checked.proof.worst
    nearest = "" if worst is None else f"; nearest to overflow: {worst.op} {worst.node}, {worst.margin_bits:.2f} bits left"
    state = "no overflow is possible" if proof.complete else "NOT PROVEN: see the errors"
    print_text("", f"proof        {state} ({len(proof.bounds)} nodes bounded{nearest})")
    print_text(*(f"assumes      {a}" for a in proof.assumptions), "")
    print_table(
        ["node", "operator", "type", "from", "to", "bits", "margin"],
        [_bound(b) for b in _shown(proof, every_node)],
        right=(3, 4, 5, 6),
    )
    if proof.layers:
        print_text("")
        show_cost(proof.cost, every_layer=every_node)


def show_cost(cost: Cost, *, every_layer: bool) -> None:
    """Integer multiply-accumulates, bit operations and bytes of weights a sample: in all, and layer by layer."""
    print_text(cost_line(cost.macs, cost.bops, cost.weight_bytes))
    if every_layer:
        columns = ["layer", "operator", "MACs", "weight bits", "activation bits", "BOPs", "weight bytes"]
        rows = [(x.node, x.op, x.macs, x.weight_bits, x.activation_bits, x.bops, x.weight_bytes) for x in cost.layers]
        print_table(columns, [tuple(map(str, row)) for row in rows], right=range(2, 7))


def cost_line(macs: int, bops: int, weight_bytes: int) -> str:
    """The totals."""
    return f"cost         {flops(macs)}MACs and {flops(bops)}BOPs a sample, {megabytes(weight_bytes)} of weight codes"


def _shown(proof: Proof, every_node: bool) -> Sequence[Bound]:
    return proof.bounds if every_node else sorted(proof.arithmetic, key=lambda b: b.margin_bits)[:TIGHTEST]


def _bound(b: Bound) -> tuple[str, ...]:
    return b.node, b.op, b.dtype, str(b.lo), str(b.hi), str(b.bits), f"{b.margin_bits:.2f}"
