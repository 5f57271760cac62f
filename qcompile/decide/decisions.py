"""Decisions: which inputs and outputs of nodes are quantized, and by which quantizer, until insert-qdq makes them real.

A decision's key is (node, slot): slot i >= 0 is input i, slot ~i (negative) is output i.  It stands in the node's `meta`, so a
clone of the graph has it too and shares the quantizers, which nobody edits.  Quantizers of one tensor that do the same are one
object.  A model file holds them as text: `Model` writes it, and the first look at a decision reads all that a file had.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

import onnx_ir as ir

from qcompile.decide.quantizer import PREFIX, Quantizer, from_text, value_at


class Use(NamedTuple):
    """One quantized input or output of a node."""

    node: ir.Node
    slot: int
    quantizer: Quantizer

    @property
    def value(self) -> ir.Value:
        """The tensor that is quantized."""
        return value_at(self.node, self.slot)

    @property
    def is_weight(self) -> bool:
        """Whether the tensor is a constant that the node reads."""
        return self.slot >= 0 and self.value.const_value is not None


def decide(node: ir.Node, slot: int, quantizer: Quantizer) -> None:
    """Record (or replace) the decision for `slot` of `node`; an equal quantizer of the same tensor is shared."""
    key = f"{PREFIX}{slot}"
    node.metadata_props.pop(key, None)
    others = (node.meta.get(f"{PREFIX}{slot}") for node, slot in _ends(value_at(node, slot)))
    node.meta[key] = next((q for q in others if q is not None and q.equals(quantizer)), quantizer)


def undecide(node: ir.Node, slot: int) -> None:
    """Forget the decision for `slot` of `node`, if any."""
    node.metadata_props.pop(f"{PREFIX}{slot}", None)
    node.meta.pop(f"{PREFIX}{slot}", None)


def decision(node: ir.Node, slot: int) -> Quantizer | None:
    """How `slot` of `node` is quantized."""
    key = f"{PREFIX}{slot}"
    if key in node.metadata_props:
        _read(node.graph or [node])
    return cast("Quantizer | None", node.meta.get(key))


def decisions(graph: ir.Graph) -> list[Use]:
    """All decisions of `graph`, in node order."""
    _read(graph)
    return [use for node in graph for use in _uses(node)]


def quantizers(graph: ir.Graph) -> list[list[Use]]:
    """The decisions of `graph`, those of one tensor and one quantizer together; in node order of the first."""
    groups: dict[tuple[ir.Value, Quantizer], list[Use]] = {}
    for use in decisions(graph):
        groups.setdefault((use.value, use.quantizer), []).append(use)
    return list(groups.values())


def settled(node: ir.Node) -> str | None:
    """Why passes leave `node` alone: a quantized model brought its scales along; None where it did not."""
    found = any(use.quantizer.imported for use in _uses(node))
    return "its scales were imported with the model (--requantize chooses them anew)" if found else None


def replace(uses: Iterable[Use], quantizer: Quantizer) -> None:
    """Let all `uses` of one quantizer have another."""
    for node, slot, _ in uses:
        decide(node, slot, quantizer)


def clear_decisions(graph: ir.Graph, *, keep_imported: bool = False) -> None:
    """Remove every decision (once they are materialised), or all but those that a quantized model brought along."""
    if keep_imported:
        for node, slot, quantizer in decisions(graph):
            if not quantizer.imported:
                undecide(node, slot)
        return
    for node in graph:
        for notes in (node.meta, node.metadata_props):
            for key in [k for k in notes if k.startswith(PREFIX)]:
                del notes[key]


def lines(node: ir.Node) -> Iterator[str]:
    """The decisions of `node` for people, one a line."""
    _read(node.graph or [node])
    for use in sorted(_uses(node), key=lambda u: u.slot):
        q, slot = use.quantizer, use.slot
        scale = "" if q.qparams is None else f" scale~{float(q.qparams.scale.mean()):.5g}"
        yield f"[{'in' if slot >= 0 else 'out'} {slot if slot >= 0 else ~slot}] {q.spec.qtype.name} {q.label(use.value)}{scale}"


def _uses(node: ir.Node) -> Iterator[Use]:
    """What stands in the node's `meta`."""
    return (Use(node, int(key[len(PREFIX) :]), q) for key, q in node.meta.items() if key.startswith(PREFIX))


def _read(nodes: Iterable[ir.Node]) -> None:
    """Text that a file had becomes objects."""
    for node in nodes:
        for key in [k for k in node.metadata_props if k.startswith(PREFIX)]:
            decide(node, int(key[len(PREFIX) :]), from_text(node.metadata_props[key]))


def _ends(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """Where decisions on `value` may stand."""
    yield from value.uses()
    producer, index = value.producer(), value.index()
    if producer is not None and index is not None:
        yield producer, ~index
