"""`qcompile inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from qcompile.cli.check import show_cost
from qcompile.cli.options import MODEL, Command, as_json, options
from qcompile.cli.output import answer, megabytes, number, percent, print_table, print_text
from qcompile.verbs.inspect import ComputeNode, EngineCard, Inspected, InspectOptions, QuantizedTensor, inspect
from qcompile.verbs.options import made

SHOWN_TENSORS = 12
SHOWN_NODES = 16
_STATE = {True: "is the file here", False: "DIFFERS from the file here", None: "the file is not here"}


@click.command("inspect", cls=Command)
@click.argument("model", type=MODEL)
@options(InspectOptions)
@as_json
def command(model: Path, given: Mapping[str, Any], as_json: bool) -> None:
    """Show what is in MODEL, an ONNX model or an engine.

    Interface, operators, structures, what qcompile wrote, the quantized tensors with their scales, and the precision of
    every GEMM, convolution and attention product.  Of an engine: what its manifest says, and whether it is true.
    """
    answer(inspect(model, made(InspectOptions, given)), as_json, show_inspection)


def show_inspection(found: Inspected | EngineCard) -> None:
    """An engine's manifest, or a model's interface, operators, structures, and what is quantized."""
    show_engine_card(found) if isinstance(found, EngineCard) else _show_model(found)


def _show_model(m: Inspected) -> None:
    print_text(f"{m.path}: {m.size_mb:.2f} MB, opset {m.opset}, {m.parameters / 1e6:.3f} M parameters")
    sides = [("input", v) for v in m.inputs] + [("output", v) for v in m.outputs]
    print_table(["", "name", "type", "shape"], [(side, v.name or "", v.dtype or "?", _shape(v.shape)) for side, v in sides])
    nodes = sorted(m.nodes.items(), key=lambda x: (-x[1], x[0]))
    print_text("", f"{sum(n for _, n in nodes)} nodes: " + ", ".join(f"{n} {name}" for name, n in nodes))
    if m.structures:
        print_text("structures: " + ", ".join(f"{s.found} {name.replace('_', ' ')}" for name, s in m.structures.items()))
    if m.metadata:
        print_text("", "made by qcompile")
        print_table(["", ""], [(k, str(v)) for k, v in m.metadata.items()])
    if m.integer is not None:
        print_text("")
        show_cost(m.integer, every_layer=True)
    if m.quantized:
        _show_quantized(m)
    if m.quantized or m.audit is not None:
        show_compute(m)


def _show_quantized(m: Inspected) -> None:
    tensors = m.quantized
    activations = sum(t.role == "activation" for t in tensors)
    share = f"{percent(m.weights.share)} of the linear and conv weights"
    print_text("", f"{activations} quantized activations, {len(tensors) - activations} stored tensors; {share}")
    rows = [_tensor_row(t) for t in tensors[:SHOWN_TENSORS]]
    print_table(["tensor", "role", "type", "granularity", "scale min", "scale max"], rows, right=(4, 5))
    if len(tensors) > SHOWN_TENSORS:
        print_text(f"... and {len(tensors) - SHOWN_TENSORS} more (all of them: --json)")


def _tensor_row(t: QuantizedTensor) -> tuple[str, ...]:
    return t.tensor or "", t.role, t.dtype or "?", t.granularity, number(t.scale_min, ".3g"), number(t.scale_max, ".3g")


def _shape(shape: Sequence[int | str | None] | None) -> str:
    return "?" if shape is None else "x".join("?" if d is None else str(d) for d in shape) or "scalar"


def show_engine_card(card: EngineCard) -> None:
    """What an engine's manifest says, and whether its digests hold."""
    print_text(f"{card.path}: {megabytes(card.engine.recorded['size'])}, {card.backend} {card.version}", "")
    print_text(f"engine       sha256 {card.engine.sha256[:16]}: {_STATE[card.engine.matches]}")
    print_text(f"model        {card.onnx.recorded['file']}, sha256 {card.onnx.sha256[:16]}: {_STATE[card.onnx.matches]}")
    print_text(f"GPUs         {', '.join(card.compute_capabilities or [])}", f"flags        {', '.join(card.flags or [])}")
    chosen = [f"{k} {v}" for k, v in (card.options or {}).items() if v]
    compiled = [f"{k} {v}" for k, v in (card.compiled or {}).items() if k in ("target", "scheme")]
    print_text(*(f"{name:<13}{', '.join(x)}" for name, x in (("options", chosen), ("compiled", compiled)) if x))
    print_text(*(f"profile {i}    {_profile(p)}" for i, p in enumerate(card.profiles or [])))
    print_text(*(f"warning      {w}" for w in card.warnings or []))
    if card.audits:
        _show_audits(card.audits)


def _profile(profile: Mapping[str, Any]) -> str:
    shapes = (f"{n} {' '.join('x'.join(map(str, s)) for s in three)}" for n, three in profile["shapes"].items())
    return f"{'; '.join(shapes)} ({profile['source']})"


def _show_audits(audits: Mapping[str, Mapping[str, Any]]) -> None:
    print_text("", "audited when it was built (share: of the planned work; coverage: of all work)")
    print_table(
        ["GPU", "planned", "share", "coverage", "attention fused", "audit"], [_audit_row(g, a) for g, a in audits.items()]
    )


def _audit_row(gpu: str, a: Mapping[str, Any]) -> tuple[str, ...]:
    planned = a["planned_flops"] / a["total_flops"] if a["total_flops"] else None
    fused = f"{a['attention_fused_blocks']} of {a['attention_blocks']}" if a["attention_blocks"] else "-"
    return gpu, percent(planned), percent(a["share"]), percent(a["coverage"]), fused, f"{a['label']} {a['version']}"


def show_compute(m: Inspected) -> None:
    """The compute nodes, first those that did not get what was planned, then those in float."""
    nodes, audit = m.compute, m.audit
    print_text("", f"{len(nodes)} compute nodes: planned {_counts(n.planned for n in nodes)}")
    if audit is not None:
        figures = f"share {percent(audit.share)}, coverage {percent(audit.coverage)}"
        counts = _counts(n.audited for n in nodes)
        print_text(f"audited for {audit.gpu} ({audit.label} {audit.version}): {counts}; {figures}")
    ordered = sorted(nodes, key=lambda n: (n.kept is not False, n.planned != "float"))
    shown = ordered[:SHOWN_NODES]
    columns = ["node", "operator", "reads", "planned", *(["audited", "kernels"] if audit is not None else [])]
    print_table(columns, [_row(n) for n in shown])
    if len(nodes) > SHOWN_NODES:
        print_text(f"... and {len(nodes) - SHOWN_NODES} more (all of them: --json)")
    print_text(*(f"{n.node}: {'; '.join(n.reasons)}" for n in shown if n.reasons))


def _counts(kinds: Iterable[str | None]) -> str:
    return ", ".join(f"{n} {kind or 'unknown'}" for kind, n in Counter(kinds).most_common()) or "none"


def _row(n: ComputeNode) -> tuple[str, ...]:
    seen = () if n.chosen is None else (n.audited or "?", ", ".join(n.chosen.kernels))
    planned = f"{n.planned}, {n.weight_only} weight" if n.weight_only else n.planned
    return n.node, n.op_type, ", ".join(n.inputs), planned, *seen
