"""`qcompile inspect`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from qcompile.cli.check import show_cost
from qcompile.cli.options import MODEL, as_json
from qcompile.cli.output import megabytes, number, percent, print_json, print_table, print_text
from qcompile.verbs.inspect import inspect

SHOWN_TENSORS = 12
SHOWN_NODES = 16
_STATE = {True: "is the file here", False: "DIFFERS from the file here", None: "the file is not here"}


@click.command("inspect")
@click.argument("model", type=MODEL)
@click.option("--audit", "audit_file", type=MODEL, metavar="RESULT.json", help="What audit --json printed: plan beside kernels.")
@click.option("--gpu", metavar="SM", help="Audit MODEL now for this GPU, e.g. sm89; none is needed here.")
@click.option("--remarks", "remarks_file", type=MODEL, metavar="OUT.json", help="What compile --remarks wrote: why float.")
@as_json
def command(model: Path, audit_file: Path | None, gpu: str | None, remarks_file: Path | None, as_json: bool) -> None:
    """Show what is in MODEL, an ONNX model or an engine.

    Interface, operators, structures, what qcompile wrote, the quantized tensors with their scales, and the precision of
    every GEMM, convolution and attention product.  Of an engine: what its manifest says, and whether it is true.
    """
    document = inspect(model, audit_file=audit_file, gpu=gpu, remarks_file=remarks_file)
    print_json(document) if as_json else show_inspection(document)


def show_inspection(document: dict[str, Any]) -> None:
    """An engine's manifest, or a model's interface, operators, structures, and what is quantized."""
    show_engine_card(document) if document["kind"] == "engine" else _show_model(document)


def _show_model(document: dict[str, Any]) -> None:
    parameters = f"{document['parameters'] / 1e6:.3f} M parameters"
    print_text(f"{document['path']}: {document['size_mb']:.2f} MB, opset {document['opset']}, {parameters}")
    rows = [(side, v["name"], v["dtype"] or "?", _shape(v["shape"])) for side in ("inputs", "outputs") for v in document[side]]
    print_table(["", "name", "type", "shape"], [(side.removesuffix("s"), *rest) for side, *rest in rows])
    nodes = sorted(document["nodes"].items(), key=lambda x: (-x[1], x[0]))
    print_text("", f"{sum(n for _, n in nodes)} nodes: " + ", ".join(f"{n} {name}" for name, n in nodes))
    if document["structures"]:
        found = [f"{s['found']} {name.replace('_', ' ')}" for name, s in document["structures"].items()]
        print_text(f"structures: {', '.join(found)}")
    if document["metadata"]:
        print_text("", "made by qcompile")
        print_table(["", ""], [(k, str(v)) for k, v in document["metadata"].items()])
    if document["integer"]:
        print_text("")
        show_cost(document["integer"], every_layer=True)
    if document["quantized"]:
        _show_quantized(document)
    if document["quantized"] or document["audit"]:
        show_compute(document)


def _show_quantized(document: dict[str, Any]) -> None:
    tensors = document["quantized"]
    activations = sum(t["role"] == "activation" for t in tensors)
    share = f"{percent(document['weights']['share'])} of the linear and conv weights"
    print_text("", f"{activations} quantized activations, {len(tensors) - activations} stored tensors; {share}")
    rows = [_tensor_row(t) for t in tensors[:SHOWN_TENSORS]]
    print_table(["tensor", "role", "type", "granularity", "scale min", "scale max"], rows, right=(4, 5))
    if len(tensors) > SHOWN_TENSORS:
        print_text(f"... and {len(tensors) - SHOWN_TENSORS} more (all of them: --json)")


def _tensor_row(t: dict[str, Any]) -> tuple[str, ...]:
    scales = (number(t["scale_min"], ".3g"), number(t["scale_max"], ".3g"))
    return t["tensor"], t["role"], t["dtype"] or "?", t["granularity"], *scales


def _shape(shape: list[int | str | None] | None) -> str:
    return "?" if shape is None else "x".join("?" if d is None else str(d) for d in shape) or "scalar"


def show_engine_card(document: dict[str, Any]) -> None:
    """What an engine's manifest says, and whether its digests hold."""
    engine, source = document["engine"], document["onnx"]
    print_text(f"{document['path']}: {megabytes(engine['size'])}, {document['backend']} {document['version']}", "")
    print_text(f"engine       sha256 {engine['sha256'][:16]}: {_STATE[engine['matches']]}")
    print_text(f"model        {source['file']}, sha256 {source['sha256'][:16]}: {_STATE[source['matches']]}")
    print_text(f"GPUs         {', '.join(document['compute_capabilities'])}", f"flags        {', '.join(document['flags'])}")
    chosen = [f"{k} {v}" for k, v in (document["options"] or {}).items() if v]
    compiled = [f"{k} {v}" for k, v in (document["compiled"] or {}).items() if k in ("target", "scheme")]
    print_text(*(f"{name:<13}{', '.join(x)}" for name, x in (("options", chosen), ("compiled", compiled)) if x))
    print_text(*(f"profile {i}    {_profile(p)}" for i, p in enumerate(document["profiles"])))
    print_text(*(f"warning      {w}" for w in document["warnings"] or []))
    if document["audits"]:
        _show_audits(document["audits"])


def _profile(profile: dict[str, Any]) -> str:
    shapes = (f"{n} {' '.join('x'.join(map(str, s)) for s in three)}" for n, three in profile["shapes"].items())
    return f"{'; '.join(shapes)} ({profile['source']})"


def _show_audits(audits: dict[str, dict[str, Any]]) -> None:
    print_text("", "audited when it was built (share: of the planned work; coverage: of all work)")
    print_table(
        ["GPU", "planned", "share", "coverage", "attention fused", "audit"], [_audit_row(g, a) for g, a in audits.items()]
    )


def _audit_row(gpu: str, a: dict[str, Any]) -> tuple[str, ...]:
    planned = a["planned_flops"] / a["total_flops"] if a["total_flops"] else None
    fused = f"{a['attention_fused_blocks']} of {a['attention_blocks']}" if a["attention_blocks"] else "-"
    return gpu, percent(planned), percent(a["share"]), percent(a["coverage"]), fused, f"{a['label']} {a['version']}"


def show_compute(document: dict[str, Any]) -> None:
    """The compute nodes, first those that did not get what was planned, then those in float."""
    nodes, audit = document["compute"], document["audit"]
    print_text("", f"{len(nodes)} compute nodes: planned {_counts(nodes, 'planned')}")
    if audit:
        figures = f"share {percent(audit['share'])}, coverage {percent(audit['coverage'])}"
        print_text(f"audited for {audit['gpu']} ({audit['label']} {audit['version']}): {_counts(nodes, 'audited')}; {figures}")
    ordered = sorted(nodes, key=lambda n: (n.get("kept") is not False, n["planned"] != "float"))
    shown = ordered[:SHOWN_NODES]
    columns = ["node", "operator", "reads", "planned", *(["audited", "kernels"] if audit else [])]
    print_table(columns, [_row(n, bool(audit)) for n in shown])
    if len(nodes) > SHOWN_NODES:
        print_text(f"... and {len(nodes) - SHOWN_NODES} more (all of them: --json)")
    print_text(*(f"{n['node']}: {'; '.join(n['reasons'])}" for n in shown if n["reasons"]))


def _counts(nodes: list[dict[str, Any]], key: str) -> str:
    return ", ".join(f"{n} {kind or 'unknown'}" for kind, n in Counter(n[key] for n in nodes).most_common()) or "none"


def _row(n: dict[str, Any], audited: bool) -> tuple[str, ...]:
    seen = (n["audited"] or "?", ", ".join(n["kernels"])) if audited else ()
    planned = f"{n['planned']}, {n['weight_only']} weight" if n["weight_only"] else n["planned"]
    return n["node"], n["op_type"], ", ".join(n["inputs"]), planned, *seen
