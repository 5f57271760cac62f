"""Graphs written node by node, with onnx alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import helper


@dataclass(kw_only=True)
class Writing:
    """Nodes and constants; a node is named after its output."""

    nodes: list[Any] = field(default_factory=list[Any])
    stored: dict[str, Any] = field(default_factory=dict[str, Any])

    def op(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """A node with one output; returns its name."""
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"n_{name}", **attributes))
        return name

    def const(self, name: str, value: Any) -> str:
        """A constant; returns its name."""
        self.stored[name] = np.asarray(value)
        return name
