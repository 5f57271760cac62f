"""Structural invariants, cheap enough to test after every pass."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.errors import VerifyError
from qcompile.ir.model import Model

_BUG = "this is a bug: please report it with the reproducer"


def verify_structure(model: Model, after: str) -> None:
    """Names are unique, every read value is made before, every output is made, the order is topological.

    Raises:
        VerifyError: naming the pass `after` which the graph is broken, and the node.
    """
    made = {v.name for v in model.graph.inputs} | set(model.graph.initializers)
    names: set[str] = set()
    for node in model.graph:
        _check_node(node, made, names, after)
        made.update(v.name for v in node.outputs)
        names.add(str(node.name))
    for out in model.graph.outputs:
        if out.name not in made:
            raise VerifyError(f"pass {after!r} lost the graph output {out.name!r}; {_BUG}")


def verify_interface(before: Model, model: Model, after: str) -> None:
    """Inputs and outputs have the names, types and order that they had.

    Raises:
        VerifyError: naming the pass `after` which they differ, and both.
    """
    for what in ("inputs", "outputs"):
        was, now = _interface(before, what), _interface(model, what)
        if was != now:
            raise VerifyError(f"pass {after!r} changed the {what} {_shown(was)} to {_shown(now)}; {_BUG}")


def _interface(model: Model, what: str) -> list[tuple[str, str]]:
    values = model.graph.outputs if what == "outputs" else model.graph.inputs
    kept = [v for v in values if what == "outputs" or v.name not in model.graph.initializers]
    return [(str(v.name), str(v.type)) for v in kept]


def _shown(interface: list[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in interface)


def _check_node(node: ir.Node, made: set[str | None], names: set[str], after: str) -> None:
    if not node.name or node.name in names:
        raise VerifyError(f"pass {after!r} left a missing or double node name {node.name!r}; {_BUG}")
    for value in node.inputs:
        if value is not None and value.name not in made:
            raise VerifyError(f"pass {after!r}: node {node.name!r} reads {value.name!r} before it is made; {_BUG}")
    for value in node.outputs:
        if value.name and value.name in made:
            raise VerifyError(f"pass {after!r}: value {value.name!r} is made twice; {_BUG}")
