"""`qcompile check`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from qcompile.cli.options import MODEL, as_json
from qcompile.cli.output import flops, megabytes, print_json, print_table, print_text
from qcompile.errors import UsageError
from qcompile.oracle.ranges import Bound, Proof
from qcompile.target.findings import Finding, Rule
from qcompile.verbs.build import gpu_list, recorded_target
from qcompile.verbs.check import TARGETS, Checked, check_file, fix_file, write_sarif

STDOUT = "-"
EXAMPLES = 2
TIGHTEST = 8


@click.command("check")
@click.argument("model", type=MODEL)
@click.option("--target", type=click.Choice(list(TARGETS)), help="Default: what the model was compiled for, else trt.")
@click.option("--gpu", metavar="SM,..", help="Also check what these GPUs can compute, e.g. sm86,sm89.")
@click.option("--fix", is_flag=True, help="Apply the mechanical fixes to a copy (-o) and check it again.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The repaired model of --fix.")
@click.option("--sarif", metavar="FILE|-", help="Write the findings as SARIF 2.1.0 (- is standard output).")
@click.option("--proof", is_flag=True, help="Of an integer-only model: the bound and the margin of every node.")
@as_json
def command(
    model: Path,
    target: str | None,
    gpu: str | None,
    fix: bool,
    output: Path | None,
    sarif: str | None,
    proof: bool,
    as_json: bool,
) -> None:
    """Check MODEL against a target's rules.

    Exit code 1 on errors (with --fix: on errors that remain): what the backend refuses, or silently runs in float.
    """
    _check_options(fix, output, sarif, as_json)
    chosen, gpus = target or recorded_target(model, TARGETS), gpu_list(gpu) if gpu else ()
    checked = fix_file(model, output, chosen, gpus) if output is not None else check_file(model, chosen, gpus)
    _print(checked, model if output is None else output, sarif, proof, as_json)
    if any(f.severity == "error" for f in checked.findings):
        click.get_current_context().exit(1)


def _check_options(fix: bool, output: Path | None, sarif: str | None, as_json: bool) -> None:
    if fix != (output is not None):
        missing, have = ("-o FIXED.onnx", "--fix") if fix else ("--fix", "-o")
        raise UsageError(f"{have} needs {missing}: the repaired model is a new file")
    if sarif == STDOUT and as_json:
        raise UsageError("--json and --sarif - both want standard output; give --sarif a file")


def _print(checked: Checked, model: Path, sarif: str | None, proof: bool, as_json: bool) -> None:
    if sarif is not None and sarif != STDOUT:
        write_sarif(checked, model, Path(sarif))
    if sarif == STDOUT:
        print_json(checked.to_sarif(model.name))
    elif as_json:
        print_json(checked.to_json())
    else:
        show_findings(checked)
        show_proof(checked, every_node=proof)


def show_findings(checked: Checked) -> None:
    """Findings grouped by rule: id and title, the nodes with the reason, and what to do."""
    rules = {rule.id: rule for rule in TARGETS[checked.target].rules}
    for rule_id, found in _by_rule(checked.findings).items():
        rule = rules[rule_id]
        print_text(f"{rule.severity} {rule.id} {rule.title} ({len(found)}x)", *_examples(found))
        print_text(f"  what to do: {rule.fix}", *_about_fix(rule, checked))
    if checked.output is not None:
        _show_fixed(checked, rules)
    errors = sum(f.severity == "error" for f in checked.findings)
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


def show_cost(cost: Mapping[str, Any], *, every_layer: bool) -> None:
    """Integer multiply-accumulates, bit operations and bytes of weights a sample: in all, and layer by layer."""
    print_text(cost_line(cost))
    if every_layer:
        columns = ["layer", "operator", "MACs", "weight bits", "activation bits", "BOPs", "weight bytes"]
        keys = ("node", "op", "macs", "weight_bits", "activation_bits", "bops", "weight_bytes")
        print_table(columns, [tuple(str(x[key]) for key in keys) for x in cost["layers"]], right=range(2, 7))


def cost_line(cost: Mapping[str, Any]) -> str:
    """The totals."""
    stored = f"{megabytes(cost['weight_bytes'])} of weight codes"
    return f"cost         {flops(cost['macs'])}MACs and {flops(cost['bops'])}BOPs a sample, {stored}"


def _shown(proof: Proof, every_node: bool) -> Sequence[Bound]:
    return proof.bounds if every_node else sorted(proof.arithmetic, key=lambda b: b.margin_bits)[:TIGHTEST]


def _bound(b: Bound) -> tuple[str, ...]:
    return b.node, b.op, b.dtype, str(b.lo), str(b.hi), str(b.bits), f"{b.margin_bits:.2f}"
