"""Products that split-range made: two of the same values, each with a range of its own."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.decide.placement import Placement
from qcompile.target.specs import activation_spec
from qcompile.target.target import Request

_BRANCH = "qcompile.range_branch"


def mark_branch(node: ir.Node) -> None:
    """Note that `node` is one of two products over parts of one tensor, or makes the scores in front of them."""
    node.metadata_props[_BRANCH] = "1"


def range_branches(out: Placement, graph: ir.Graph, request: Request) -> None:
    """Quantize both inputs of every such product: who asked for the split wants it in integers."""
    for node in graph:
        if _BRANCH not in node.metadata_props:
            continue
        if reason := request.selection.excluded(node):
            out.miss(node, reason)
            continue
        out.add(node, 0, activation_spec(request))
        out.add(node, 1, activation_spec(request))
