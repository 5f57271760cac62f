"""Logarithmic codes in standard operators: Div, Log, Mul, Round, Clip, Cast, and a Gather from the table of values."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ir.edit import add_constant, new_node
from qcompile.quant.companding import log_table, steps
from qcompile.quant.qtype import QType
from qcompile.quant.spec import QParams


def log_chain(graph: ir.Graph, value: ir.Value, params: QParams, qtype: QType, dtype: np.dtype) -> list[ir.Node]:
    """Nodes from `value` to its decoded codes; log(0) = -inf becomes the last code, which stands for 0."""
    stem, scale = str(value.name), float(params.scale)

    def constant(name: str, number: float) -> ir.Value:
        return add_constant(graph, f"{stem}_{name}", np.asarray(number, dtype))

    chain: list[ir.Node] = []

    def step(op: str, *others: ir.Value, **attributes: int) -> None:
        source = chain[-1].outputs[0] if chain else value
        chain.append(new_node(graph, op, [source, *others], name=f"{stem}_{op}", like=value, attributes=attributes))

    step("Div", constant("log_scale", scale))
    step("Log")
    step("Mul", constant("log_steps", -steps(qtype) / np.log(2.0)))
    step("Round")
    step("Clip", constant("log_first", 0.0), constant("log_last", qtype.qmax))
    step("Cast", to=int(ir.DataType.INT32))
    chain[-1].outputs[0].type = ir.TensorType(ir.DataType.INT32)
    table = add_constant(graph, f"{stem}_log_table", log_table(scale, qtype).astype(dtype))
    chain.append(new_node(graph, "Gather", [table, chain[-1].outputs[0]], name=f"{stem}_Gather", like=value))
    return chain
