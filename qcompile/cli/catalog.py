"""What there is: passes, targets, schemes, and the contents of a model."""

from __future__ import annotations

from typing import Any

from qcompile.cli.cards import show_compute, show_engine_card
from qcompile.cli.check_view import show_cost
from qcompile.cli.output import number, percent, print_table, print_text
from qcompile.pipeline.describe import OptionHelp, PassHelp

SHOWN_TENSORS = 12


def show_passes(document: dict[str, Any]) -> None:
    """All passes, presets and the default pipelines."""
    print_table(["pass", "kind", "what"], [(p["name"], p["kind"], p["help"]) for p in document["passes"]])
    for title in ("presets", "defaults"):
        if document[title]:
            print_text("", {"presets": "presets (write them like passes)", "defaults": "what runs without --passes"}[title])
            print_table(["name", "pipeline"], sorted(document[title].items()))
    print_text("", "one pass with its options: qcompile passes NAME")


def show_pass(p: PassHelp) -> None:
    """One pass in full."""
    print_text(f"{p.name} ({p.kind})", "", p.text)
    if p.requires or p.establishes:
        print_text("", f"requires     {', '.join(p.requires) or 'nothing'}")
        print_text(f"establishes  {', '.join(p.establishes) or 'nothing'}")
    if p.options:
        print_text("")
        print_table(["option", "takes", "default", "what"], [_option_row(o) for o in p.options])


def _option_row(o: OptionHelp) -> tuple[str, str, str, str]:
    return o.name, o.takes, "-" if o.default is None else o.default, o.help


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
