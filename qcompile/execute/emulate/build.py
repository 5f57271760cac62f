"""A few lines of standard operators in front of a node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike

from qcompile.ir.edit import add_constant, new_node, replace_value

FLOAT = ir.DataType.FLOAT


class Lines:
    """Appends operators right before `node`; each call answers the value that the operator makes."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node, self.stem = graph, node, str(node.name)

    def __call__(self, op_type: str, *inputs: ir.Value, dtype: ir.DataType = FLOAT, **attributes: Any) -> ir.Value:
        made = new_node(self.graph, op_type, inputs, name=f"{self.stem}_{op_type}", attributes=attributes)
        made.outputs[0].type = ir.TensorType(dtype)
        self.graph.insert_before(self.node, [made])
        return made.outputs[0]

    def number(self, value: float) -> ir.Value:
        """A float32 scalar."""
        return self.constant(np.float32(value))

    def constant(self, array: ArrayLike, dtype: ir.DataType | None = None) -> ir.Value:
        """An initializer."""
        return add_constant(self.graph, f"{self.stem}_constant", np.asarray(array), dtype)

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Cast, unless `value` is known to have that type."""
        return value if value.dtype == dtype else self("Cast", value, dtype=dtype, to=int(dtype))

    def block_amax(self, x: ir.Value, rank: int, size: int) -> tuple[ir.Value, ir.Value]:
        """x [.., K] as blocks [.., K / size, size], and the largest magnitude of each [.., K / size, 1]."""
        split = self.constant(np.array([*[0] * (rank - 1), -1, size], np.int64))
        blocks = self("Reshape", x, split)
        return blocks, self("ReduceMax", self("Abs", blocks), self.constant(np.array([-1])), keepdims=1)

    def join_blocks(self, blocks: ir.Value, rank: int, dtype: ir.DataType) -> ir.Value:
        """[.., K / n, n] as [.., K] (for [.., K / n, 1]: as [.., K / n])."""
        target = [*[0] * (rank - 1), -1]
        return self("Reshape", blocks, self.constant(np.array(target, np.int64)), dtype=dtype)

    def finish(self, *outputs: ir.Value) -> None:
        """Let `outputs` take the place and the names of the node's, and remove it."""
        for old, new in zip(self.node.outputs, outputs, strict=False):
            name, is_output = old.name, old.is_graph_output()
            replace_value(self.graph, old, new)
            if not is_output:
                old.name, new.name = None, name
        self.graph.remove(self.node, safe=True)


def rank_of(value: ir.Value | None) -> int | None:
    """The number of axes, if it is known."""
    return None if value is None or value.shape is None else len(value.shape)
