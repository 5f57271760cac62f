"""Engines, and the precision of a model's compute nodes, for `qcompile inspect`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from qcompile.cli.output import megabytes, percent, print_table, print_text

SHOWN_NODES = 16
_STATE = {True: "is the file here", False: "DIFFERS from the file here", None: "the file is not here"}


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
