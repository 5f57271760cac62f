"""`qcompile audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qcompile.cli.options import MODEL, as_json, profile_option
from qcompile.cli.output import flops, percent, print_json, print_table, print_text
from qcompile.errors import GateError
from qcompile.verbs.build import DEFAULT_GPU, audit, engine_targets, gpu_list, profile_from

FLOAT_NODES = 8


@click.command("audit")
@click.argument("model", type=MODEL)
@click.option("--gpu", default=DEFAULT_GPU, show_default=True, metavar="SM", help="The GPU to build for; none is needed here.")
@click.option(
    "--target",
    type=click.Choice(engine_targets()),
    default="rtx",
    show_default=True,
    help="trt needs the tensorrt package and a GPU.",
)
@profile_option
@click.option("--min-share", type=click.FloatRange(0, 1), metavar="X", help="Fail (exit 1) if the share is lower.")
@as_json
def command(model: Path, gpu: str, target: str, profile: str | None, min_share: float | None, as_json: bool) -> None:
    """Show which kernels MODEL really gets.

    Builds with TensorRT-RTX and reads which GEMMs and convolutions became low-precision kernels; nothing is run.
    """
    result = audit(model, gpu_list(gpu)[0], profile_from(profile), target)
    document = result.to_json()
    print_json(document) if as_json else show_audit(document)
    share = document["share"]
    if min_share is not None and (share is None or share < min_share):
        raise GateError(f"the share is {share}, below --min-share {min_share}; look at the nodes that run in float, or lower it")


def audit_lines(a: dict[str, Any]) -> list[str]:
    """The figures of one audit."""
    blocks = f"{a['attention_fused_blocks']} of {a['attention_blocks']} blocks" if a["attention_blocks"] else "no attention"
    return [
        f"audit        {a['gpu']} ({a['label']} {a['version']}; built, not run)",
        _share(a),
        f"coverage     {percent(a['coverage'])} of all GEMM, convolution and attention work ({flops(a['total_flops'])}FLOP)",
        f"attention    {blocks} run as one fused kernel" if a["attention_blocks"] else f"attention    {blocks}",
    ]


def _share(a: dict[str, Any]) -> str:
    if a["share"] is not None:
        return f"share        {percent(a['share'])} of the planned work runs in low-precision kernels"
    only = f"; {percent(a['weight_only_flops'] / a['total_flops'])} reads low-precision weights" if a["weight_only_flops"] else ""
    return f"share        - (no work has low-precision inputs on both sides{only})"


def show_audit(document: dict[str, Any]) -> None:
    """The figures, the nodes that run in float, and the Q/DQ pairs that gain nothing."""
    print_text(*audit_lines(document))
    if document["profile"]:
        print_text(f"profile      {profile_text(document['profile']['shapes'])} ({document['profile']['source']})")
    floats = sorted(document["float_nodes"], key=lambda n: -n["flops"])
    if floats:
        print_text("", f"in float: {len(floats)} nodes (largest first)")
        rows = [(n["node"], n["op_type"], flops(n["flops"]), n["planned"] or "-") for n in floats[:FLOAT_NODES]]
        print_table(["node", "operator", "FLOPs", "planned"], rows, right=(2,))
    if document["wasted_pairs"]:
        print_text("", "Q/DQ pairs whose consumer runs in float")
        print_table(["pair", "node", "rule"], [(w["pair"], w["node"], w["rule"] or "-") for w in document["wasted_pairs"]])


def profile_text(shapes: dict[str, list[list[int]]]) -> str:
    """`x:1x3,8x3,32x3`."""
    return "; ".join(f"{name}:{','.join('x'.join(map(str, s)) for s in three)}" for name, three in shapes.items())
