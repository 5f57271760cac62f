"""Quantized constants: codes behind one DQ with constant scales, biases in floats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.decide.imports import granularity, spec_of
from qcompile.ir.edit import add_constant, bypass, erase, replace_value
from qcompile.ir.ops import const_array, ints_attr, is_op
from qcompile.ir.quantizers import QUANTIZE, Affine, affine, constants
from qcompile.quant.affine import dequantize, quantize
from qcompile.quant.spec import QParams


def quantize_constants(graph: ir.Graph) -> list[str]:
    """Q of a float constant becomes its codes, rounded half to even."""
    found = [n for n in graph if is_op(n, QUANTIZE) and const_array(n.inputs[0]) is not None]
    return [str(n.name) for n in found if _quantized(graph, n)]


def _quantized(graph: ir.Graph, q: ir.Node) -> bool:
    array, found = const_array(q.inputs[0]), affine(q)
    spec = None if found is None or array is None else spec_of(found)
    if array is None or found is None or spec is None or q.outputs[0].is_graph_output():
        return False
    codes = quantize(array.astype(np.float32), QParams(found.scale, found.zero_point), spec.qtype, spec.granularity)
    assert q.inputs[0] is not None
    made = add_constant(graph, f"{q.inputs[0].name}_quantized", codes, found.dtype)
    replace_value(graph, q.outputs[0], made)
    erase(graph, q)
    return True


def float_biases(graph: ir.Graph) -> list[str]:
    """DQ of int32 codes becomes their float values."""
    found = [(node, codes) for node, codes in constants(graph) if codes.dtype == np.int32]
    return [str(node.name) for node, codes in found if _folded(graph, node, codes)]


def _folded(graph: ir.Graph, dq: ir.Node, codes: NDArray[np.int32]) -> bool:
    found = affine(dq)
    if found is None or dq.outputs[0].is_graph_output():
        return False
    values = dequantize(codes, QParams(found.scale, found.zero_point), granularity(found))
    replace_value(graph, dq.outputs[0], add_constant(graph, f"{dq.name}_value", values))
    erase(graph, dq)
    return True


def turn_codes(graph: ir.Graph) -> list[str]:
    """DQ(codes) -> Transpose becomes DQ(transposed codes), where no other node reads the DQ."""
    return [str(t.name) for dq, codes in list(constants(graph)) for t in _alone(dq) if _turned(graph, dq, codes, t)]


def _alone(dq: ir.Node) -> list[ir.Node]:
    uses = list(dq.outputs[0].uses())
    return [uses[0][0]] if len(uses) == 1 and is_op(uses[0][0], "Transpose") and uses[0][0].graph is dq.graph else []


def _turned(graph: ir.Graph, dq: ir.Node, codes: NDArray, turn: ir.Node) -> bool:
    found = affine(dq)
    perm = ints_attr(turn, "perm") or tuple(reversed(range(codes.ndim)))
    if found is None or dq.outputs[0].is_graph_output() or turn.outputs[0].is_graph_output():
        return False
    rewrite_constant(graph, dq, found, lambda a: np.ascontiguousarray(a.transpose(perm)), perm)
    bypass(graph, turn)
    return True


def rewrite_constant(
    graph: ir.Graph, dq: ir.Node, found: Affine, change: Callable[[NDArray], NDArray], perm: tuple[int, ...] | None = None
) -> None:
    """Give a DQ of constants changed codes; under `perm` its axis and blocked scales are turned with them."""
    codes, stem = const_array(dq.inputs[0]), dq.inputs[0]
    assert codes is not None and stem is not None
    dq.replace_input_with(0, add_constant(graph, f"{stem.name}_turned", change(codes), stem.dtype or found.dtype))
    if perm is None:
        return
    if found.scale.ndim:
        dq.attributes["axis"] = ir.AttrInt64("axis", perm.index(found.axis))
    for slot in (1, 2) if found.block else ():
        value, array = (dq.inputs[slot], const_array(dq.inputs[slot])) if slot < len(dq.inputs) else (None, None)
        if value is not None and array is not None:
            turned = np.ascontiguousarray(array.transpose(perm))
            dq.replace_input_with(slot, add_constant(graph, f"{value.name}_turned", turned, value.dtype))
    dq.outputs[0].shape = None
