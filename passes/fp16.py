"""fp16: the float rest in half precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qcompile.calib.observers import AbsMax, AbsMaxStat, MinMax, MinMaxStat, Probe, Stat
from qcompile.ir.edit import add_constant, drop_if_unused, insert_after, new_node, redirect, swap_output
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array, is_data_movement, is_op
from qcompile.passes._half_bias import free_large_biases
from qcompile.passes._magnitude import upper_bounds
from qcompile.pipeline.base import Fact, Kind, Pass, PassContext, PassResult

HALF_MAX = 65504.0
_SAFE = HALF_MAX / 4
_SMALL = 256.0  # a few such biases fit into the margin above _SAFE
_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_FLOAT_SLOTS = {"Resize": (1, 2), "Upsample": (1,)}
_FLOAT_OPS = frozenset(
    {"Range", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "NonMaxSuppression", "RoiAlign"}
)
_BOUNDED = frozenset(
    {"Softmax", "Sigmoid", "Tanh", "Erf", "Sin", "Cos", "QuantizeLinear", "DequantizeLinear", "Cast", "Clip", "Relu"}
)


@dataclass(frozen=True)
class Half(Pass):
    """Turn float32 tensors, weights and scales into float16; the graph's interface keeps its types.

    before: x: f32 -> MatMul -> y: f32
    after:  x: f32 -> Cast -> MatMul in f16 -> Cast -> y: f32
    A node whose inputs or outputs exceed 16376 (a quarter of float16's largest number) on calibration data, or
    whose constant would vanish, stays in float32 with a remark; constants beyond 65504 (masks) are clamped to it.
    """

    name = "fp16"
    kind = Kind.LOWER
    requires = frozenset({Fact.CANONICAL})
    establishes = frozenset({Fact.HALF})

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """The largest magnitude of every float tensor that could overflow; a margin while weights may still change."""
        limit = _SAFE if any(n.op_type == "QuantizeLinear" for n in model.graph) else _SAFE / 2
        return [_probe(value) for value in _watched(model.graph, limit)]

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Convert every node that is safe; cast where precisions meet."""
        ShapeInferencePass()(model.ir)
        graph = model.graph
        freed = free_large_biases(graph)
        if freed:
            ctx.note("", f"{freed} biases moved behind their layer: ONNX Runtime overflows them in float16")
        large = {str(v.name) for v in _watched(graph) if _largest(ctx.stats.get(_probe(v))) > _SAFE}
        keep = {node.name for node in graph if _stays(node, large, ctx)}
        half = [node for node in graph if node.name not in keep]
        for node in half:
            _convert(node)
        _meet(graph, {id(n) for n in half})
        ctx.applied("", f"{len(half)} nodes in float16, {len(keep)} kept in float32")
        return PassResult(bool(half))


def _probe(value: ir.Value) -> Probe:
    """Per channel for tokens [batch, tokens, channels], since such extremes follow folds, also where the value is copied into
    that layout next; per tensor for the rest."""
    value = copy = _source(value)
    while (
        not _is_tokens(copy)
        and len(uses := list(copy.uses())) == 1
        and is_op(uses[0][0], "Reshape", "Transpose")
        and not copy.is_graph_output()
    ):
        copy = uses[0][0].outputs[0]
    return Probe(str(copy.name), MinMax(-1)) if _is_tokens(copy) else Probe(str(value.name), AbsMax())


def _source(value: ir.Value) -> ir.Value:
    """What bounds `value`: the tensor that it is after small constants are added, or it is scaled down by one."""
    while (node := value.producer()) is not None and is_op(node, "Add", "Mul", "Div") and len(node.inputs) == 2:
        slot = next((i for i in (0, 1) if const_array(node.inputs[1 - i]) is not None), None)
        data = node.inputs[slot] if slot is not None else None
        if data is None or slot is None or data.dtype != _FLOAT or not _harmless(node, slot):
            return value
        value = data
    return value


def _harmless(node: ir.Node, slot: int) -> bool:
    constant = const_array(node.inputs[1 - slot])
    if constant is None or not constant.size or constant.dtype.kind != "f":
        return False
    size = np.abs(constant)
    match node.op_type:
        case "Add":
            return bool(size.max() <= _SMALL)
        case "Mul":
            return bool(size.max() <= 1)
        case _:
            return slot == 0 and bool(size.min() >= 1)


def _is_tokens(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 3


def _largest(stat: Stat | None) -> float:
    match stat:
        case MinMaxStat():
            return float(np.abs([stat.lo, stat.hi]).max())
        case AbsMaxStat():
            return float(stat.amax)
        case _:
            return 0.0


def _watched(graph: ir.Graph, limit: float = _SAFE) -> Iterator[ir.Value]:
    """Tensors that may exceed `limit` as far as the weights tell."""
    bounds = upper_bounds(graph)
    for node in graph:
        if node.op_type in _BOUNDED or is_data_movement(node):
            continue
        yield from (v for v in node.outputs if v.dtype == _FLOAT and v.uses() and bounds[str(v.name)] > limit)


def _stays(node: ir.Node, large: set[str], ctx: PassContext) -> bool:
    """Whether `node` must stay in float32; remarks the reason where it is about values."""
    if node.op_type in _FLOAT_OPS or node.domain not in ("", "ai.onnx") or _has_body(node):
        return True
    if not any(v is not None and v.dtype == _FLOAT for v in (*node.inputs, *node.outputs)):
        return True
    hot = [str(v.name) for v in (*node.inputs, *node.outputs) if v is not None and v.name in large]
    if hot:
        ctx.missed(str(node.name), f"kept in float32: {hot[0]} exceeds {_SAFE:.0f} on calibration data")
        return True
    if any(_vanishes(v) for v in node.inputs):
        ctx.missed(str(node.name), "kept in float32: its constant would round to zero in float16")
        return True
    return False


def _has_body(node: ir.Node) -> bool:
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def _vanishes(value: ir.Value | None) -> bool:
    if value is None or value.const_value is None or value.dtype != _FLOAT or value.const_value.size != 1:
        return False
    number = float(value.const_value.numpy().reshape(-1)[0])
    return number != 0.0 and float(np.float16(np.clip(number, -HALF_MAX, HALF_MAX))) == 0.0


def _convert(node: ir.Node) -> None:
    """Attributes and output types of one node; its inputs are cast by `_meet`."""
    for out in node.outputs:
        if out.dtype == _FLOAT:
            out.type = ir.TensorType(_HALF)
    if node.op_type == "Cast" and node.attributes["to"].as_int() == _FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(_HALF))
    if node.op_type == "ConstantOfShape" and "value" in node.attributes:
        tensor = node.attributes["value"].as_tensor().numpy()
        if tensor.dtype == np.float32:
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(to_half(tensor)))


def to_half(array: np.ndarray) -> np.ndarray:
    """float16 copy, saturating instead of overflowing."""
    return np.clip(array, -HALF_MAX, HALF_MAX).astype(np.float16)


def _meet(graph: ir.Graph, half: set[int]) -> None:
    for value in list(graph.initializers.values()):
        if value.dtype == _FLOAT:
            _meet_constant(graph, value, half)
    for value in [*graph.inputs, *(v for n in list(graph) for v in n.outputs)]:
        if value.dtype in (_FLOAT, _HALF):
            _meet_value(graph, value, half)


def _wants_half(node: ir.Node, slot: int, half: set[int]) -> bool:
    return id(node) in half and slot not in _FLOAT_SLOTS.get(node.op_type, ())


def _meet_constant(graph: ir.Graph, value: ir.Value, half: set[int]) -> None:
    uses = [(n, i) for n, i in value.uses() if _wants_half(n, i, half)]
    if uses and value.const_value is not None:
        new = add_constant(graph, f"{value.name}_fp16", to_half(value.const_value.numpy()))
        redirect(value, new, uses)
        drop_if_unused(graph, value)


def _meet_value(graph: ir.Graph, value: ir.Value, half: set[int]) -> None:
    """Readers in the other precision get one Cast; a graph output returns to float32."""
    is_half = value.dtype == _HALF
    others = [(n, i) for n, i in value.uses() if _wants_half(n, i, half) != is_half and not n.op_type.startswith("Cast")]
    to = _FLOAT if is_half else _HALF
    output = value.is_graph_output() and is_half
    if not others and not output:
        return
    cast = new_node(graph, "Cast", [value], name=f"{value.name}_to_{to.name.lower()}", attributes={"to": int(to)})
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(to), value.shape
    insert_after(graph, value, cast)
    redirect(value, cast.outputs[0], others)
    if output:
        swap_output(graph, value, cast.outputs[0])
        value.type = ir.TensorType(_HALF)
        cast.outputs[0].type = ir.TensorType(_FLOAT)
