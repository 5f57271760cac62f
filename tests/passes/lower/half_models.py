"""Models that overflow in float16, and the conversion that everyone writes first."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompile.execute.emulate.bf16 import round_stored
from qcompile.execute.emulate.runnable import runnable
from qcompile.ir.edit import add_constant, insert_after, new_node, replace_value, set_constant
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array, float_attr, is_op
from qcompile.ir.tensors import map_tensors
from qcompile.pipeline import registry
from tests.passes.models import Feeds
from tests.passes.running import context, run_passes

MODELS = Path(__file__).parents[3] / "models"
_HALF = ir.DataType.FLOAT16


@cache
def digits(kind: str, count: int = 32) -> Feeds:
    """Pictures of models/vit_digits.onnx."""
    with np.load(MODELS / f"vit_digits.{kind}.npz") as data:
        return {"input": data["input"][:count]}


def overflowing_vit(scale: float) -> Model:
    """vit_digits with its residual stream times `scale` (a power of two) and its LayerNorms in primitive operators.

    LN(s x; s^2 eps) = LN(x; eps): the function is the same, in float32 exactly.
    """
    model, _ = run_passes(Model.load(MODELS / "vit_digits.onnx"), registry.parse("canonicalize"), digits("calib"), context())
    norms = [n for n in model.graph if n.op_type == "LayerNormalization"]
    scaled: set[tuple[str, int]] = set()
    for norm in norms:
        _scale(norm.inputs[0], scale, scaled)
    for norm in norms:
        _decompose(model.graph, norm, float_attr(norm, "epsilon", 1e-5) * scale**2)
    model.name_nodes()
    return model


def _scale(value: ir.Value | None, scale: float, done: set[tuple[str, int]]) -> None:
    """Multiply the constants that make the stream: embeddings, biases, and the weights of the layers that feed it."""
    node = value.producer() if value is not None else None
    if node is None or is_op(node, "LayerNormalization"):
        return
    linear = is_op(node, "MatMul", "Conv")
    for slot, source in enumerate(node.inputs):
        array = const_array(source)
        if array is not None and array.dtype == np.float32 and (str(node.name), slot) not in done:
            done.add((str(node.name), slot))
            set_constant(node, slot, array * np.float32(scale))
        elif array is None and not linear:
            _scale(source, scale, done)


def _decompose(graph: ir.Graph, norm: ir.Node, eps: float) -> None:
    x, gamma, beta = norm.inputs
    assert x is not None
    made: list[ir.Node] = []

    def node(op_type: str, *inputs: ir.Value | None) -> ir.Value:
        attributes = {"axes": [-1]} if op_type == "ReduceMean" else {}
        made.append(new_node(graph, op_type, inputs, name=f"{norm.name}_{op_type}{len(made)}", attributes=attributes))
        made[-1].outputs[0].type = x.type
        return made[-1].outputs[0]

    centred = node("Sub", x, node("ReduceMean", x))
    variance = node("ReduceMean", node("Pow", centred, add_constant(graph, "two", np.asarray(2, np.float32))))
    root = node("Sqrt", node("Add", variance, add_constant(graph, "eps", np.asarray(eps, np.float32))))
    y = node("Add", node("Mul", node("Div", centred, root), gamma), beta)
    insert_after(graph, x, *made)
    replace_value(graph, norm.outputs[0], y)
    graph.remove(norm, safe=True)


def strict(model: Model) -> Model:
    """Every 16-bit tensor stored as such: ONNX Runtime's CPU provider would keep chains of operators in float32."""
    copy = runnable(model.clone())
    round_stored(copy.graph, _HALF)
    return copy


def naive_half(model: Model) -> Model:
    """Every float32 constant, tensor and input in float16, whatever its size."""
    half = model.clone()
    with np.errstate(over="ignore"):
        map_tensors(half.ir, _narrowed)
    for value in [*half.graph.inputs, *half.graph.initializers.values(), *(v for n in half.graph for v in n.outputs)]:
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(_HALF)
    for node in half.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(_HALF))
    return half


def _narrowed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().astype(np.float16), name=tensor.name) if tensor.dtype == ir.DataType.FLOAT else tensor
