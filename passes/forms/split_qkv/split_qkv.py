"""split-qkv: a packed query-key-value projection as three."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.ir.edit import add_constant, erase_dead, new_node, replace_value
from qcompile.ir.infer import infer_shapes
from qcompile.ir.model import Model
from qcompile.ir.notes import copy_notes
from qcompile.ir.ops import const_array, int_attr, ints_attr, is_op
from qcompile.passes.forms.split_qkv.packed_linear import join_thirds
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult, Stage

_PARTS = 3


@dataclass(frozen=True)
class Packed:
    """MatMul (+ Add) whose columns are q, k and v: `parts[i]` is the value that holds part i after the split.

    `heads` and `head_dim` are set when the split goes through Reshape [B, N, 3, H, D] and Transpose (2, 0, 3, 1, 4).
    """

    matmul: ir.Node
    bias: ir.Node | None
    parts: tuple[ir.Value, ...]
    heads: int = 0
    head_dim: int = 0


@dataclass(frozen=True)
class SplitQkv(Pass):
    """Split packed qkv weights into three: TensorRT compiles per-channel int8 to an int8 kernel only for the parts.

    before: MatMul(x, W[C, 3C]) -> Add -> Reshape[B,N,3,H,D] -> Transpose -> Split -> q, k, v
    after:  q = MatMul(x, W_q) -> Add -> Reshape[B,N,H,D] -> Transpose, likewise k and v
    (for TensorRT, a Gemm or another layout: the three parts joined again by a Concat in front of what follows).
    Exact. The builder merges the three into one kernel again (measured: 66 % -> 100 % of a GPT's work in int8).
    """

    name = "split-qkv"
    kind = Kind.EQUIVALENT
    needs = Stage.CANONICAL

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Split every packed projection that is found."""
        found = list(find_packed(model.graph))
        for packed in found:
            _split(model.graph, packed)
            ctx.remarks.applied(str(packed.matmul.name), "packed qkv projection split into three")
        joined = join_thirds(model.graph, ctx) if ctx.target.joins_thirds else 0
        erase_dead(model)
        if found or joined:
            infer_shapes(model)
        return PassResult(bool(found) or joined > 0)


def find_packed(graph: ir.Graph) -> Iterator[Packed]:
    """Every packed projection: Split on the last axis, or Reshape, Transpose and Split / Gather / Slice."""
    for node in list(graph):
        if is_op(node, "MatMul") and const_array(node.inputs[1]) is not None:
            packed = _packed(node)
            if packed is not None:
                yield packed


def _packed(matmul: ir.Node) -> Packed | None:
    weight = const_array(matmul.inputs[1])
    if weight is None or weight.ndim != 2 or weight.shape[1] % _PARTS:
        return None
    bias = _bias_add(matmul, weight.shape[1])
    out = bias.outputs[0] if bias is not None else matmul.outputs[0]
    uses = [(n, i) for n, i in out.uses() if not is_op(n, "Shape")]
    if len(uses) != 1 or out.is_graph_output():
        return None
    step = uses[0][0]
    if is_op(step, "Split"):
        parts = _last_axis_parts(step, out)
        return Packed(matmul, bias, parts) if parts else None
    return _through_heads(matmul, bias, step, weight.shape[1]) if is_op(step, "Reshape") else None


def _bias_add(matmul: ir.Node, width: int) -> ir.Node | None:
    uses = list(matmul.outputs[0].uses())
    if len(uses) != 1 or not is_op(uses[0][0], "Add"):
        return None
    add, slot = uses[0]
    bias = const_array(add.inputs[1 - slot])
    return add if bias is not None and bias.shape == (width,) else None


def _last_axis_parts(split: ir.Node, data: ir.Value) -> tuple[ir.Value, ...] | None:
    rank = len(data.shape) if data.shape is not None else None
    axis = int_attr(split, "axis", 0)
    if len(split.outputs) != _PARTS or not (axis == -1 or (rank is not None and axis == rank - 1)):
        return None
    sizes = const_array(split.inputs[1]) if len(split.inputs) > 1 else None
    if sizes is not None and len(set(sizes.tolist())) != 1:
        return None
    return tuple(split.outputs)


def _through_heads(matmul: ir.Node, bias: ir.Node | None, reshape: ir.Node, width: int) -> Packed | None:
    uses = list(reshape.outputs[0].uses())
    if len(uses) != 1 or not is_op(uses[0][0], "Transpose") or ints_attr(uses[0][0], "perm") != (2, 0, 3, 1, 4):
        return None
    dims = _reshape_tail(reshape)
    if dims is None or dims[0] != _PARTS or int(np.prod(dims)) != width:
        return None
    parts = _leading_parts(uses[0][0].outputs[0])
    return Packed(matmul, bias, parts, dims[1], dims[2]) if parts else None


def _reshape_tail(reshape: ir.Node) -> tuple[int, int, int] | None:
    """The last three numbers of a 5-D target shape, constant or a Concat of constants at its end."""
    target = const_array(reshape.inputs[1])
    if target is not None:
        return tuple(int(d) for d in target[2:]) if len(target) == 5 else None  # type: ignore[return-value]
    producer = reshape.inputs[1].producer() if reshape.inputs[1] is not None else None
    if producer is None or not is_op(producer, "Concat"):
        return None
    tail = [const_array(v) for v in producer.inputs[2:]]
    if len(producer.inputs) != 5 or any(t is None or t.size != 1 for t in tail):
        return None
    return tuple(int(t.reshape(-1)[0]) for t in tail if t is not None)  # type: ignore[return-value]


def _leading_parts(value: ir.Value) -> tuple[ir.Value, ...] | None:
    """What picks index 0, 1 and 2 of the first axis: Split + Squeeze, Gather, or Slice + Squeeze."""
    found: dict[int, ir.Value] = {}
    for node, _ in value.uses():
        for index, part in _picked(node):
            if part is None or index in found:
                return None
            found[index] = part
    return tuple(found[i] for i in range(_PARTS)) if sorted(found) == list(range(_PARTS)) else None


def _picked(node: ir.Node) -> list[tuple[int, ir.Value | None]]:
    if is_op(node, "Split") and int_attr(node, "axis", 0) == 0 and len(node.outputs) == _PARTS:
        return [(i, _squeezed(out)) for i, out in enumerate(node.outputs)]
    if is_op(node, "Gather") and int_attr(node, "axis", 0) == 0:
        index = const_array(node.inputs[1])
        return [(int(index), node.outputs[0])] if index is not None and index.ndim == 0 else [(-1, None)]
    if is_op(node, "Slice") and len(node.inputs) >= 4:
        start, axes = const_array(node.inputs[1]), const_array(node.inputs[3])
        if start is not None and axes is not None and axes.tolist() == [0]:
            return [(int(start[0]), _squeezed(node.outputs[0]))]
    return [(-1, None)]


def _squeezed(value: ir.Value) -> ir.Value | None:
    uses = list(value.uses())
    if len(uses) != 1 or not is_op(uses[0][0], "Squeeze"):
        return None
    axes = const_array(uses[0][0].inputs[1]) if len(uses[0][0].inputs) > 1 else None
    return uses[0][0].outputs[0] if axes is not None and axes.tolist() == [0] else None


def _split(graph: ir.Graph, packed: Packed) -> None:
    weight = const_array(packed.matmul.inputs[1])
    assert weight is not None
    bias = (
        const_array(packed.bias.inputs[0] if const_array(packed.bias.inputs[0]) is not None else packed.bias.inputs[1])
        if packed.bias
        else None
    )
    columns = np.split(np.arange(weight.shape[1]), _PARTS)
    for name, cols, part in zip("qkv", columns, packed.parts, strict=True):
        replace_value(graph, part, _project(graph, packed, name, weight[:, cols], None if bias is None else bias[cols]))


def _project(graph: ir.Graph, packed: Packed, part: str, weight: np.ndarray, bias: np.ndarray | None) -> ir.Value:
    """One third of the projection, in the layout that the packed part had."""
    anchor = packed.bias or packed.matmul
    stem = f"{packed.matmul.name}_{part}"
    dtype = packed.matmul.outputs[0].type
    chain = [new_node(graph, "MatMul", [packed.matmul.inputs[0], add_constant(graph, f"{stem}_weight", weight)], name=stem)]
    if bias is not None:
        chain.append(
            new_node(graph, "Add", [chain[-1].outputs[0], add_constant(graph, f"{stem}_bias", bias)], name=f"{stem}_bias_add")
        )
    if packed.heads:
        shape = add_constant(graph, f"{stem}_shape", np.array([0, 0, packed.heads, packed.head_dim], np.int64))
        chain.append(new_node(graph, "Reshape", [chain[-1].outputs[0], shape], name=f"{stem}_heads"))
        chain.append(
            new_node(graph, "Transpose", [chain[-1].outputs[0]], name=f"{stem}_transpose", attributes={"perm": [0, 2, 1, 3]})
        )
    for node in chain:
        node.outputs[0].type = dtype
    graph.insert_after(anchor, chain)
    copy_notes(packed.matmul, chain[0])
    return chain[-1].outputs[0]
