"""canonicalize: one form for what exporters write in many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, LiftConstantsToInitializersPass, RemoveInitializersFromInputsPass
from onnxscript.optimizer import fold_constants

from qcompile.ir.edit import add_constant, erase_dead, replace_value
from qcompile.ir.infer import forget_declared, infer_shapes
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array, input_at, is_op
from qcompile.ir.qoperators import spell_qdq
from qcompile.ir.shape_fold import fold_shapes
from qcompile.ir.shapes import rank
from qcompile.ir.widen import widen
from qcompile.passes.forms.canonicalize.identities import drop_identities
from qcompile.passes.forms.canonicalize.nan_guard import idle_guard, move_guard
from qcompile.passes.forms.canonicalize.operators.table import take_apart
from qcompile.pipeline.base import EQUIVALENT_TOLERANCE, Kind, Pass, PassContext, PassResult, Stage

_SIZE_LIMIT = 1 << 31
_SHAPE_ROUNDS = 8
_SPLIT_COUNTS = 18
_FREE_INITIALIZERS = 4  # the IR version from which on initializers need not be inputs
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_WIDENED = {ir.DataType.FLOAT16: 2.0**-5, ir.DataType.BFLOAT16: 2.0**-2, ir.DataType.DOUBLE: 2.0**-11}
"""How far the outputs may move when a type is computed in float32: 64 times its rounding error (of float32 for float64, where
8192 times 2^-24 are the noise of real models)."""


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Fold constants, inline functions, write fused operators in plain ones, drop what does nothing.

    before: Cast(fp16 weight) -> MatMul;  Pad(0,0);  Add(x, 0);  Dropout;  Identity(shared gamma) -> LayerNormalization
    after:  MatMul with a float weight;   nothing;   nothing;    nothing;  LayerNormalization with its own gamma
    Attention of every kind, RotaryEmbedding, Einsum and what ONNX Runtime's optimizer fuses (com.microsoft) become the plain
    operators that they stand for; `ort` keeps its own attention operators whole.
    float16, bfloat16 and float64 are computed in float32 from here on; inputs and outputs keep their types behind a Cast.
    Operators on integer codes (QLinearConv, QGemm) and TensorRT's own Q and DQ become standard Q/DQ around float operators.
    """

    name = "canonicalize"
    kind = Kind.EQUIVALENT
    needs = Stage.SOURCE
    reaches = Stage.CANONICAL
    widen: Annotated[bool, "compute float16, bfloat16 and float64 in float32"] = True

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Raises ModelError: a quantized operator that cannot be read."""
        before, count = _signature(model.graph), len(model.graph)
        InlinePass()(model.ir)
        RemoveInitializersFromInputsPass()(model.ir)
        for name in spell_qdq(model):
            ctx.remarks.applied(name, "computed on codes; now Q/DQ around a float operator")
        model.ir.ir_version = max(model.ir.ir_version, _FREE_INITIALIZERS)
        declared = [v.shape for v in model.graph.outputs]
        _spell_defaults(model)
        forget_declared(model)
        tolerance = self._typed(model, ctx)
        take_apart(model, ctx)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model.ir)
        fold_constants(model.ir, input_size_limit=_SIZE_LIMIT, output_size_limit=_SIZE_LIMIT, should_fold=_foldable)
        _spell_splits(model)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model.ir)
        drop_identities(model.ir)
        _fold_known_shapes(model)
        for node in list(model.graph):
            _simplify(model.graph, node, ctx)
        if not ctx.target.whole_attention(ctx.scheme):
            _move_guards(model, ctx)
        erase_dead(model)
        infer_shapes(model)
        _declare_again(model.graph, declared)
        model.name_nodes()
        _remark_subgraphs(model, ctx)
        modified = before != _signature(model.graph) or tolerance > EQUIVALENT_TOLERANCE
        if modified:
            ctx.remarks.applied("", f"{count} nodes became {len(model.graph)}")
        else:
            ctx.remarks.note("", "already canonical")
        return PassResult(modified, tolerance=tolerance)

    def _typed(self, model: Model, ctx: PassContext) -> float:
        """Infer types and shapes, computing other floating-point types in float32; how far that may move the outputs."""
        if self.widen:
            return _widened(model, ctx)
        infer_shapes(model)
        return EQUIVALENT_TOLERANCE


def _widened(model: Model, ctx: PassContext) -> float:
    """`Canonicalize._typed` where other types are widened."""
    kinds = sorted(widen(model), key=lambda dtype: dtype.name)
    if not kinds:
        return EQUIVALENT_TOLERANCE
    names = " and ".join(kind.name.lower() for kind in kinds)
    ctx.remarks.applied("", f"computed in float32 instead of {names}; inputs and outputs keep their types")
    return max(_WIDENED[kind] for kind in kinds)


def _signature(graph: ir.Graph) -> tuple[object, ...]:
    """What the graph is made of, without the weights' values (no step changes those under an old name)."""
    nodes = [
        (n.domain, n.op_type, n.name, [v and v.name for v in n.inputs], [v.name for v in n.outputs], sorted(n.attributes))
        for n in graph.all_nodes()
    ]
    return nodes, sorted(graph.initializers)


def _declare_again(graph: ir.Graph, declared: Sequence[ir.Shape | None]) -> None:
    """Outputs of which nothing else is known keep their word."""
    for value, shape in zip(graph.outputs, declared, strict=True):
        if value.shape is None and shape is not None:
            value.shape = shape.copy()


def _fold_known_shapes(model: Model) -> None:
    """Each round of shape inference may make more Reshape targets and pads constant."""
    for _ in range(_SHAPE_ROUNDS):
        infer_shapes(model)
        if not fold_shapes(model.graph):
            return


def _foldable(node: ir.Node) -> bool | None:
    """Fold whatever has only constant inputs but codes, which would be lost; leave the folder's own rules to the rest."""
    if node.op_type in _QUANTIZERS:
        return False
    return True if node.inputs and all(v is None or v.const_value is not None for v in node.inputs) else None


def _spell_splits(model: Model) -> None:
    """The folder writes Split(num_outputs) for SplitToSequence in any opset; before 18, equal parts have no attribute."""
    if model.opset < _SPLIT_COUNTS:
        for node in model.graph.all_nodes():
            if node.op_type == "Split" and not node.domain:
                node.attributes.pop("num_outputs", None)


def _spell_defaults(model: Model) -> None:
    """onnx's inference takes an STFT that leaves `onesided` out for a two-sided one, which it is not."""
    for node in model.graph.all_nodes():
        if is_op(node, "STFT"):
            node.attributes.setdefault("onesided", ir.AttrInt64("onesided", 1))


def _simplify(graph: ir.Graph, node: ir.Node, ctx: PassContext) -> None:
    if (probabilities := idle_guard(node)) is not None and not node.outputs[0].is_graph_output():
        replace_value(graph, node.outputs[0], probabilities)
    elif is_op(node, "Where") and _always(node) and not node.outputs[0].is_graph_output():
        assert node.inputs[1] is not None
        replace_value(graph, node.outputs[0], node.inputs[1])
    elif node.op_type == "Pad" and node.domain == "" and _spell_pads(graph, node):
        ctx.remarks.applied(str(node.name), "pads written out for every axis")
    elif _does_nothing(node):
        source = node.inputs[0]
        assert source is not None
        if source.is_graph_input() and node.outputs[0].is_graph_output():
            return
        replace_value(graph, node.outputs[0], source) if not node.outputs[0].is_graph_output() else _bypass_output(graph, node)


def _move_guards(model: Model, ctx: PassContext) -> None:
    for node in list(model.graph):
        if is_op(node, "Where") and move_guard(model.graph, node, model.opset):
            ctx.remarks.applied(str(node.name), "NaN guard moved behind the product with the values")


def _always(where: ir.Node) -> bool:
    """Whether the first choice is taken everywhere, in its own shape."""
    condition, first, out = const_array(where.inputs[0]), where.inputs[1], where.outputs[0]
    same = first is not None and first.shape is not None and first.shape == out.shape
    return condition is not None and bool(condition.all()) and same


def _spell_pads(graph: ir.Graph, pad: ir.Node) -> bool:
    """Pads of some `axes` as pads of all: ONNX Runtime's optimizer mistakes the short form."""
    axes, pads, size = (input_at(pad, 3), input_at(pad, 1), rank(pad.inputs[0]))
    wanted, amounts = (None if v is None else const_array(v) for v in (axes, pads))
    if wanted is None or amounts is None or size is None:
        return False
    full, count = np.zeros((2, size), np.int64), len(wanted)
    full[:, [int(a) % size for a in wanted]] = amounts.reshape(2, count)
    pad.replace_input_with(1, add_constant(graph, f"{pad.name}_pads", full.reshape(-1)))
    pad.resize_inputs(3 if pad.inputs[2] is not None else 2)
    return True


def _bypass_output(graph: ir.Graph, node: ir.Node) -> None:
    """A graph output made by a node that does nothing: rename its source, if that is not an interface too."""
    source = node.inputs[0]
    assert source is not None
    if source.is_graph_output() or source.is_initializer():
        return
    replace_value(graph, node.outputs[0], source)


def _does_nothing(node: ir.Node) -> bool:
    if not node.inputs or node.inputs[0] is None:
        return False
    match node.op_type:
        case "Dropout":
            return not _trains(node) and not any(v.uses() or v.is_graph_output() for v in node.outputs[1:])
        case "Pad":
            pads = const_array(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
            return pads is not None and not np.any(pads)
        case "Add":
            return _keeps(node, 0.0)
        case "Mul":
            return _keeps(node, 1.0)
        case _:
            return False


def _trains(node: ir.Node) -> bool:
    """Whether a Dropout may drop: its training_mode is given, and is not a constant False."""
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    array = None if mode is None else const_array(mode)
    return mode is not None and (array is None or bool(array.any()))


def _keeps(node: ir.Node, neutral: float) -> bool:
    """Whether the constant second operand is neutral and does not broadcast the first to a larger shape."""
    other, data = node.inputs[1], node.inputs[0]
    array = const_array(other) if other is not None else None
    if array is None or array.dtype.kind != "f" or not np.all(array == neutral) or data is None:
        return False
    return array.ndim == 0 or (data.shape is not None and array.ndim <= len(data.shape) and all(d == 1 for d in array.shape))


def _remark_subgraphs(model: Model, ctx: PassContext) -> None:
    for node in model.graph:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            ctx.remarks.note(str(node.name), f"the body of this {node.op_type} is left in float")
        elif node.domain not in ("", "ai.onnx", "com.microsoft"):
            ctx.remarks.note(str(node.name), f"custom operator {node.domain}::{node.op_type} is left in float")
