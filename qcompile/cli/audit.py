"""`qcompile audit`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qcompile.cli.options import MODEL, Command, as_json, options
from qcompile.cli.output import answer, flops, percent, print_table, print_text
from qcompile.verbs.build import AuditOptions, AuditResult, Profile, audit_model, require_share
from qcompile.verbs.options import made

FLOAT_NODES = 8


@click.command("audit", cls=Command)
@click.argument("model", type=MODEL)
@options(AuditOptions)
@as_json
def command(model: Path, given: Mapping[str, Any], as_json: bool) -> None:
    """Show which kernels MODEL really gets.

    Builds with TensorRT-RTX and reads which GEMMs and convolutions became low-precision kernels; nothing is run.
    """
    asked = made(AuditOptions, given)
    result = audit_model(model, asked)
    answer(result, as_json, show_audit)
    require_share(result, asked.min_share)


def audit_lines(a: AuditResult) -> list[str]:
    """The figures of one audit."""
    found, fused = a.attention
    blocks = f"{fused} of {found} blocks run as one fused kernel" if found else "no attention"
    head, notes = f"audit        {a.gpu} ({a.label} {a.version}; built, not run)", [f"note         {n}" for n in a.notes]
    if a.blind:
        return [head, *notes]
    return [
        head,
        _share(a),
        f"coverage     {percent(a.coverage)} of all GEMM, convolution and attention work ({flops(a.total_flops)}FLOP)",
        f"attention    {blocks}",
        *notes,
    ]


def _share(a: AuditResult) -> str:
    if a.share is not None:
        return f"share        {percent(a.share)} of the planned work runs in low-precision kernels"
    only = f"; {percent(a.weight_only_flops / a.total_flops)} reads low-precision weights" if a.weight_only_flops else ""
    return f"share        - (no work has low-precision inputs on both sides{only})"


def show_audit(a: AuditResult) -> None:
    """The figures, the nodes that run in float, and the Q/DQ pairs that gain nothing."""
    print_text(*audit_lines(a))
    if a.profile is not None:
        print_text(f"profile      {profile_text(a.profile)}")
    floats = sorted(a.float_nodes, key=lambda n: -n.flops)
    if floats:
        print_text("", f"in float: {len(floats)} nodes (largest first)")
        rows = [(n.item.node, n.item.op_type, flops(n.flops), n.item.low_type or "-") for n in floats[:FLOAT_NODES]]
        print_table(["node", "operator", "FLOPs", "planned"], rows, right=(2,))
    if a.wasted_pairs:
        print_text("", "Q/DQ pairs whose consumer runs in float")
        print_table(["pair", "node", "rule"], [(w.pair, w.node, w.rule or "-") for w in a.wasted_pairs])


def profile_text(profile: Profile) -> str:
    """`x:1x3,8x3,32x3 (given)`."""
    shapes = (f"{name}:{','.join('x'.join(map(str, s)) for s in three)}" for name, three in profile.to_json().items())
    return f"{'; '.join(shapes)} ({profile.source})"
