"""fuse-norm: a LayerNorm written as primitive operators becomes one LayerNormalization."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.ir import ops
from qcompile.ir.edit import add_constant, erase_dead, fresh_name, insert_after, new_node, replace_value
from qcompile.ir.model import Model
from qcompile.ir.notes import copy_notes
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult, Stage
from qcompile.structure.core import Refusal
from qcompile.structure.norm import Norm, match_norm

_OPERATOR = {"layer": ("LayerNormalization", 17), "rms": ("RMSNormalization", 23)}


@dataclass(frozen=True)
class FuseNorm(Pass):
    """Turn decomposed LayerNorm (and, from opset 23, RMSNorm) into the one operator that computes its variance in float32.

    before: ReduceMean, Sub, Pow, ReduceMean, Add(eps), Sqrt, Div, Mul(gamma), Add(beta)
    after:  LayerNormalization(x, gamma, beta) {epsilon};  y = (x - E[x]) / sqrt(Var[x] + eps) * gamma + beta
    In float16 the squares of the chain overflow above |x - E[x]| = 256; the operator's stash type is float32.
    """

    name = "fuse-norm"
    kind = Kind.EQUIVALENT
    needs = Stage.CANONICAL
    after = ("opset",)

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Fuse every decomposed norm whose inner values nobody else reads."""
        fused = [root for root in list(model.graph) if ops.is_op(root, "Sqrt", "Pow") and _at(model, root, ctx)]
        if fused:
            erase_dead(model)
        return PassResult(bool(fused))


def _at(model: Model, root: ir.Node, ctx: PassContext) -> bool:
    """Matched one by one: the output of a norm may be the input of the next."""
    match = match_norm(root)
    if isinstance(match, Refusal):
        ctx.remarks.missed(str(root.name), match.reason)
    return isinstance(match, Norm) and match.kind in _OPERATOR and _fuse(model, match, ctx)


def _fuse(model: Model, norm: Norm, ctx: PassContext) -> bool:
    op_type, since = _OPERATOR[norm.kind]
    source = _source(norm)
    refusal = _refusal(norm, model.opset, since, source)
    if refusal is not None or source is None:
        ctx.remarks.missed(str(norm.node.name), refusal or "its casts do not meet")
        return False
    names = [str(node.name) for node in norm.nodes]
    _replace(model.graph, norm, op_type, source)
    ctx.remarks.applied(names[-1], f"{len(names)} nodes became one {op_type}", epsilon=norm.eps)
    return True


def _refusal(norm: Norm, opset: int, since: int, source: ir.Value | None) -> str | None:
    if opset < since:
        return f"opset {opset} has no {_OPERATOR[norm.kind][0]}; put opset{{version={since}}} in front"
    if source is None:
        return "its input and its output differ in type"
    if norm.channels is None:
        return "the number of channels is unknown"
    if any(ops.is_op(node, "Max", "Clip") for node in norm.nodes):
        return "it clips the variance instead of adding epsilon"
    outside = _read_outside(norm)
    return None if outside is None else f"its inner value {outside} is read elsewhere"


def _source(norm: Norm) -> ir.Value | None:
    """The input in the type of the output: casts to float32 around the chain are what the operator does inside."""
    value: ir.Value | None = norm.input
    while value is not None and value.dtype != norm.output.dtype:
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and ops.is_op(producer, "Cast") else None
    return value


def _read_outside(norm: Norm) -> str | None:
    """The name of an inner value that somebody else needs; a repeated Sub or Cast of the same chain is no one else."""
    inner: dict[ir.Node, None] = dict.fromkeys(norm.nodes[:-1])
    for user in [u for node in norm.nodes[:-1] for u in _users(node)]:
        if ops.is_op(user, "Sub", "Cast") and _stays_inside(user, [*inner, norm.node]):
            inner[user] = None
    ends = {*inner, norm.node}
    for node in inner:
        for out in node.outputs:
            if out.is_graph_output() or any(user not in ends for user, _ in out.uses()):
                return str(out.name)
    return None


def _users(node: ir.Node) -> Iterator[ir.Node]:
    return (user for out in node.outputs for user, _ in out.uses())


def _stays_inside(node: ir.Node, inside: Sequence[ir.Node]) -> bool:
    return all(user in inside for user in _users(node)) and not any(out.is_graph_output() for out in node.outputs)


def _replace(graph: ir.Graph, norm: Norm, op_type: str, source: ir.Value) -> None:
    inputs: list[ir.Value | None] = [source, _vector(graph, norm, norm.gamma, "gamma", 1.0)]
    if norm.beta is not None:
        inputs.append(_vector(graph, norm, norm.beta, "beta", 0.0))
    attributes = {"axis": -1, "epsilon": float(norm.eps)}
    new = new_node(graph, op_type, inputs, name=f"{norm.node.name}_{op_type}", like=norm.output, attributes=attributes)
    for node in norm.nodes:
        copy_notes(node, new)
    old = norm.output
    insert_after(graph, old, new)
    name, was_output = old.name, old.is_graph_output()
    replace_value(graph, old, new.outputs[0])
    if not was_output:  # the tensor keeps its name, so statistics of it stay valid
        old.name = fresh_name(graph, f"{name}_chain")
        new.outputs[0].name = name


def _vector(graph: ir.Graph, norm: Norm, value: ir.Value | None, part: str, neutral: float) -> ir.Value:
    """gamma or beta as [C] in the type of the output; a new constant unless the old one is that already."""
    array, dtype = ops.const_array(value), norm.output.dtype
    channels = norm.channels
    assert channels is not None and dtype is not None
    if value is not None and array is not None and array.shape == (channels,) and value.dtype == dtype:
        return value
    flat = np.full(channels, neutral) if array is None else np.broadcast_to(array.reshape(-1), (channels,))
    return add_constant(graph, f"{norm.output.name}_{part}", flat.astype(dtype.numpy()), dtype)
