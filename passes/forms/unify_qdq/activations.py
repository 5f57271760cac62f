"""Q/DQ of activations: one pair a quantizer, DQ right behind Q, limits and Relu as float operators in front."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qcompile.ir.edit import add_constant, bypass, insert_after, new_node, redirect, replace_value
from qcompile.ir.ops import const_array, input_at, is_const, is_data_movement, is_op
from qcompile.ir.quantizers import DEQUANTIZE, QUANTIZE, Affine, affine, pairs

_SIGNED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Sum", "BatchNormalization")
_CODES = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16})


def clip_in_front(graph: ir.Graph) -> list[str]:
    """Q -> Clip(codes) -> DQ becomes Clip -> Q -> DQ: rounding keeps the order of numbers."""
    return [str(clip.name) for clip in list(graph) if _is_code_clip(clip) and _moved(graph, clip)]


def _is_code_clip(node: ir.Node) -> bool:
    source = node.inputs[0].producer() if is_op(node, "Clip") and node.inputs[0] is not None else None
    return source is not None and is_op(source, QUANTIZE) and len(list(source.outputs[0].uses())) == 1


def _moved(graph: ir.Graph, clip: ir.Node) -> bool:
    q = clip.inputs[0].producer() if clip.inputs[0] is not None else None
    found, bounds = (None if q is None else affine(q)), [const_array(input_at(clip, slot)) for slot in (1, 2)]
    if q is None or found is None or found.scale.ndim or any(b is None and input_at(clip, 1 + i) for i, b in enumerate(bounds)):
        return False
    source = q.inputs[0]
    assert source is not None
    limits: list[ir.Value | None] = [None if b is None else _limit(graph, clip, b, found) for b in bounds]
    made = new_node(graph, "Clip", [source, *limits], name=f"{clip.name}_in_front", like=source)
    graph.insert_before(q, made)
    q.replace_input_with(0, made.outputs[0])
    bypass(graph, clip)
    return True


def _limit(graph: ir.Graph, clip: ir.Node, code: np.ndarray, found: Affine) -> ir.Value:
    value = (code.astype(np.float64).reshape(()) - found.zero_point) * found.scale
    return add_constant(graph, f"{clip.name}_limit", value.astype(np.float32))


def hoist_dequantize(graph: ir.Graph) -> list[str]:
    """What only moves codes moves numbers instead, between DQ and Q with the codes' own scale; again and again."""
    done: list[str] = []
    while (found := next(_behind_movement(graph), None)) is not None:
        mover, dq = found
        done.append(str(mover.name))
        _hoist(graph, mover, dq)
    return done


def _behind_movement(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node]]:
    for dq in graph:
        mover = dq.inputs[0].producer() if is_op(dq, DEQUANTIZE) and dq.inputs[0] is not None else None
        if mover is None or not _moves_codes(mover) or not _agreed(mover.outputs[0], dq):
            continue
        yield mover, dq


def _moves_codes(node: ir.Node) -> bool:
    plain = is_data_movement(node) and not is_op(node, "Pad")
    return (plain or is_op(node, "MaxPool")) and len(node.outputs) == 1 and not is_const(node.inputs[0])


def _agreed(codes: ir.Value, dq: ir.Node) -> bool:
    """Whether all readers dequantize the codes alike, with one scale."""
    own = affine(dq)
    if own is None or own.scale.ndim or codes.is_graph_output() or codes.dtype not in (None, *_CODES):
        return False
    readers = [n for n, _ in codes.uses()]
    return all(is_op(n, DEQUANTIZE) and n.graph is dq.graph and (a := affine(n)) is not None and a.equals(own) for n in readers)


def _hoist(graph: ir.Graph, mover: ir.Node, dq: ir.Node) -> None:
    for slot in range(len(mover.inputs)) if is_op(mover, "Concat") else (0,):
        value = mover.inputs[slot]
        assert value is not None
        name, like = f"{dq.name}_in_front", dq.outputs[0]
        made = new_node(graph, DEQUANTIZE, [value, *dq.inputs[1:]], name=name, attributes={})
        made.outputs[0].type, made.outputs[0].shape = like.type, value.shape
        insert_after(graph, value, made) if value.producer() is not None else graph.insert_before(mover, made)
        mover.replace_input_with(slot, made.outputs[0])
    out, readers = mover.outputs[0], list(mover.outputs[0].uses())
    q = new_node(graph, QUANTIZE, [out, *dq.inputs[1:]], name=f"{mover.name}_{QUANTIZE}", like=out, attributes=_code_type(dq))
    q.outputs[0].type, out.type = out.type, dq.outputs[0].type
    graph.insert_after(mover, q)
    redirect(out, q.outputs[0], readers)


def _code_type(dq: ir.Node) -> dict[str, int]:
    """Without a zero point the type of the codes is an attribute."""
    found = affine(dq)
    return {} if found is None or len(dq.inputs) > 2 else {"output_dtype": int(found.dtype)}


def merge_equal(graph: ir.Graph) -> list[str]:
    """Of equal Q of one tensor one stays, of equal DQ of one Q too; a DQ whose numbers are quantized alike again is the last."""
    seen: dict[ir.Value, list[ir.Node]] = {}
    done = [str(n.name) for n in list(graph) if is_op(n, QUANTIZE, DEQUANTIZE) and _merged(graph, n, seen)]
    return done + [str(n.name) for n in list(graph) if is_op(n, QUANTIZE) and _repeated(graph, n)]


def _merged(graph: ir.Graph, node: ir.Node, seen: dict[ir.Value, list[ir.Node]]) -> bool:
    source, own = node.inputs[0], affine(node)
    if source is None or own is None or node.outputs[0].is_graph_output():
        return False
    others = seen.setdefault(source, [])
    twin = next((other for other in others if _twins(other, node, own)), None)
    if twin is None:
        others.append(node)
        return False
    replace_value(graph, node.outputs[0], twin.outputs[0])
    graph.remove(node, safe=True)
    return True


def _twins(other: ir.Node, node: ir.Node, own: Affine) -> bool:
    found = affine(other)
    same = other.op_type == node.op_type and other.outputs[0].dtype == node.outputs[0].dtype
    return same and found is not None and found.equals(own)


def _repeated(graph: ir.Graph, q: ir.Node) -> bool:
    dq = q.inputs[0].producer() if q.inputs[0] is not None else None
    own, before = affine(q), affine(dq) if dq is not None and is_op(dq, DEQUANTIZE) else None
    codes = None if dq is None else dq.inputs[0]
    if own is None or before is None or codes is None or not own.equals(before) or q.outputs[0].is_graph_output():
        return False
    replace_value(graph, q.outputs[0], codes)
    graph.remove(q, safe=True)
    return True


def spell_relu(graph: ir.Graph) -> list[str]:
    """Numbers below 0 that a Q with its zero point at the lowest code cuts off are cut by a Relu in front."""
    return [str(pair.q.name) for pair in pairs(graph) if _cuts(pair.affine, pair.source) and _rectified(graph, pair.q)]


def _cuts(found: Affine, source: ir.Value) -> bool:
    if found.dtype not in _CODES or found.scale.ndim:
        return False
    lowest = int(np.iinfo(found.dtype.numpy()).min)
    return int(found.zero_point) == lowest and is_op(source.producer(), *_SIGNED)


def _rectified(graph: ir.Graph, q: ir.Node) -> bool:
    source = q.inputs[0]
    assert source is not None
    relu = new_node(graph, "Relu", [source], name=f"{q.name}_Relu", like=source)
    graph.insert_before(q, relu)
    q.replace_input_with(0, relu.outputs[0])
    return True
