"""Normalisation layers: the single operators and the decomposed chains of exporters, as one view."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from qcompile.ir import ops
from qcompile.ir.shapes import dims, rank
from qcompile.structure.core import Matches, Refusal, Site, is_channel_vector, once, only_user, other_input, sorted_out
from qcompile.structure.norm_groups import group_chain

NormKind = Literal["layer", "rms", "group"]
_DIRECT: dict[str, NormKind] = {
    "LayerNormalization": "layer",
    "RMSNormalization": "rms",
    "SimplifiedLayerNormalization": "rms",
    "GroupNormalization": "group",
}


@dataclass(frozen=True)
class Norm:
    """output = normalise(input) * gamma + beta over the last axis ("group": channel axis 1, constants may be [C, 1, 1]).

    `gamma_site` / `beta_site` are the slots to write new constants to; None when there is no node to hold them (decomposed
    chain without affine part, RMSNorm without beta).  A LayerNormalization without B has beta None and beta_site (node, 2), an
    empty slot.  `nodes` in graph order; for a decomposed chain the last one makes `output`.
    """

    kind: NormKind
    input: ir.Value
    output: ir.Value
    gamma: ir.Value | None
    beta: ir.Value | None
    gamma_site: Site | None
    beta_site: Site | None
    axis: int
    eps: float
    nodes: tuple[ir.Node, ...]

    @property
    def node(self) -> ir.Node:
        """The node that makes the output."""
        return self.nodes[-1]

    @property
    def channels(self) -> int | None:
        """Number of channels, or None when neither gamma nor the shapes tell."""
        for value in (self.gamma, self.beta):
            shape = ops.static_shape(value)
            if shape:
                return max(d or 0 for d in shape)
        known = dims(self.output) or dims(self.input)
        size = known[self.axis] if known else None
        return size if isinstance(size, int) else None


@once
def find_norms(graph: ir.Graph) -> Matches[Norm]:
    """All LayerNorm, RMSNorm and GroupNorm layers of the main graph, in graph order of the node that divides."""
    return sorted_out(match_norm(node) for node in graph)


def match_norm(node: ir.Node) -> Norm | Refusal | None:
    """The norm whose operator, or whose square root, is `node`; None if it is neither."""
    if node.op_type in _DIRECT and node.domain in ("", "com.microsoft"):
        return _direct(node)
    if ops.is_op(node, "InstanceNormalization"):
        return _instance(node)
    return _decomposed(node) if _root_exponent(node) is not None else None


# ---- single operators ---------------------------------------------------------------------------------------------


def _direct(node: ir.Node) -> Norm | Refusal:
    kind = _DIRECT[node.op_type]
    x, gamma, beta = (ops.input_at(node, slot) for slot in range(3))
    assert x is not None
    if gamma is not None and not ops.is_const(gamma):
        return Refusal(node, "its scale is computed, not constant")
    if beta is not None and not ops.is_const(beta):
        return Refusal(node, "its bias is computed, not constant")
    why_not = _group_refusal(node, gamma, x) if kind == "group" else _axis_refusal(node, gamma, x)
    if why_not is not None:
        return Refusal(node, why_not)
    beta_site = None if kind == "rms" else (node, 2)
    eps = ops.float_attr(node, "epsilon", 1e-5)
    return Norm(kind, x, node.outputs[0], gamma, beta, (node, 1), beta_site, 1 if kind == "group" else -1, eps, (node,))


def _instance(node: ir.Node) -> Norm | Refusal:
    chain = group_chain(node)
    if chain is None:
        return Refusal(node, "its scale or bias is computed, not constant")
    x, output, *sites, nodes = chain
    gamma, beta = (None if site is None else site[0].inputs[site[1]] for site in sites)
    return Norm("group", x, output, gamma, beta, sites[0], sites[1], 1, ops.float_attr(node, "epsilon", 1e-5), nodes)


def _axis_refusal(node: ir.Node, gamma: ir.Value | None, x: ir.Value) -> str | None:
    axis = ops.int_attr(node, "axis", -1)
    known = rank(x) or rank(node.outputs[0])
    if not is_channel_vector(gamma):
        return "normalises over several axes, or its scale is not a channel vector"
    if axis == -1 or (known is not None and axis == known - 1):
        return None
    return "rank unknown: run canonicalize" if known is None else "normalises over several axes"


def _group_refusal(node: ir.Node, gamma: ir.Value | None, x: ir.Value) -> str | None:
    scale, known = ops.static_shape(gamma), dims(x)
    if scale and known and len(known) > 1 and scale[0] == known[1]:
        return None
    return "its scale is per group, not per channel (opset < 21)"


# ---- decomposed chains --------------------------------------------------------------------------------------------


def _root_exponent(node: ir.Node) -> float | None:
    """0.5 for Sqrt(v) and Pow(v, 0.5), -0.5 for Pow(v, -0.5), else None."""
    if ops.is_op(node, "Sqrt"):
        return 0.5
    exponent = ops.const_scalar(node.inputs[1]) if ops.is_op(node, "Pow") else None
    return exponent if exponent is not None and abs(exponent) == 0.5 else None


def _decomposed(root: ir.Node) -> Norm | Refusal | None:
    variance, eps, nodes = _without_eps(_uncast(root.inputs[0]))
    mean = _producer(variance, "ReduceMean")
    square = None if mean is None else _square_operand(_uncast(mean.inputs[0]))
    if mean is None or square is None:
        return None
    if not _over_last_axis(mean):
        return Refusal(root, "normalises over another axis than the last, or over an unknown one")
    normalised = _normalised(root, square)
    if normalised is None:
        return Refusal(root, "looks like a norm, but nothing divides its input by this root")
    body = [*_between(square), *nodes, mean, root, *normalised]
    return _with_affine(square, eps, body)


def _uncast(value: ir.Value | None) -> ir.Value | None:
    producer = None if value is None else value.producer()
    return producer.inputs[0] if producer is not None and ops.is_op(producer, "Cast", "Identity") else value


def _producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    producer = None if value is None else value.producer()
    return producer if ops.is_op(producer, *op_types) else None


def _without_eps(value: ir.Value | None) -> tuple[ir.Value | None, float, list[ir.Node]]:
    add = _producer(value, "Add", "Max", "Clip")
    if add is None or len(add.inputs) < 2:
        return value, 0.0, []
    for slot in (1, 0):
        eps = ops.const_scalar(add.inputs[slot])
        if eps is not None:
            return _uncast(add.inputs[1 - slot]), eps, [add]
    return value, 0.0, []


def _square_operand(value: ir.Value | None) -> ir.Value | None:
    """d of Pow(d, 2) or Mul(d, d)."""
    node = _producer(value, "Pow", "Mul")
    if node is None:
        return None
    first, second = node.inputs[0], node.inputs[1]
    squared = ops.const_scalar(second) == 2.0 if node.op_type == "Pow" else first is second
    return first if squared else None


def _over_last_axis(mean: ir.Node) -> bool:
    axes = ops.ints_attr(mean, "axes") or ops.const_ints(ops.input_at(mean, 1))
    known = rank(mean.inputs[0]) or rank(mean.outputs[0])
    return bool(ops.int_attr(mean, "keepdims", 1)) and axes is not None and (axes == (-1,) or axes == ((known or 0) - 1,))


def _centred_input(value: ir.Value) -> tuple[ir.Value, list[ir.Node]] | None:
    """(x, [mean, sub]) of d = x - mean(x)."""
    sub = _producer(_uncast(value), "Sub")
    mean = None if sub is None else _producer(_uncast(sub.inputs[1]), "ReduceMean")
    if sub is None or mean is None or not _over_last_axis(mean):
        return None
    x = sub.inputs[0]
    if x is None or _uncast(mean.inputs[0]) is not _uncast(x):
        return None
    return x, [mean, sub]


def _between(square: ir.Value) -> list[ir.Node]:
    return [user for user, _ in square.uses() if ops.is_op(user, "Pow", "Mul") and _square_operand(user.outputs[0]) is square][:1]


def _same(first: ir.Value | None, second: ir.Value | None) -> bool:
    """Equal values up to casts and a repeated Sub (some exporters subtract the mean twice)."""
    first, second = _uncast(first), _uncast(second)
    if first is second:
        return True
    a, b = _producer(first, "Sub"), _producer(second, "Sub")
    return a is not None and b is not None and _uncast(a.inputs[0]) is _uncast(b.inputs[0]) and _is_mean(a) and _is_mean(b)


def _is_mean(sub: ir.Node) -> bool:
    return _producer(_uncast(sub.inputs[1]), "ReduceMean") is not None


def _normalised(root: ir.Node, d: ir.Value) -> list[ir.Node] | None:
    """Nodes from the root to d / root, the last one making the quotient."""
    for value, path, inverse in _inverse_forms(root):
        for user, slot in value.uses():
            divides = not inverse and ops.is_op(user, "Div") and slot == 1 and _same(user.inputs[0], d)
            multiplies = inverse and ops.is_op(user, "Mul") and _same(user.inputs[1 - slot], d)
            if divides or multiplies:
                return [*path, user]
    return None


def _inverse_forms(root: ir.Node) -> Iterator[tuple[ir.Value, list[ir.Node], bool]]:
    inverse = _root_exponent(root) == -0.5
    yield root.outputs[0], [], inverse
    for user, slot in root.outputs[0].uses():
        if ops.is_op(user, "Cast"):
            yield user.outputs[0], [user], inverse
        elif ops.is_op(user, "Reciprocal") or (ops.is_op(user, "Div") and slot == 1 and ops.const_scalar(user.inputs[0]) == 1.0):
            yield user.outputs[0], [user], True


def _with_affine(d: ir.Value, eps: float, body: list[ir.Node]) -> Norm:
    centred = _centred_input(d)
    x, front = centred if centred is not None else (d, [])
    value = _past_cast(body[-1].outputs[0], body)
    gamma_site, value = _affine_step(value, "Mul", body)
    beta_site, value = _affine_step(value, "Add", body)
    gamma, beta = (None if site is None else site[0].inputs[site[1]] for site in (gamma_site, beta_site))
    kind: NormKind = "layer" if centred is not None else "rms"
    return Norm(kind, x, value, gamma, beta, gamma_site, beta_site, -1, eps, (*front, *body))


def _past_cast(value: ir.Value, body: list[ir.Node]) -> ir.Value:
    cast = only_user(value, "Cast")
    follower = None if cast is None else only_user(cast.outputs[0], "Mul")
    if cast is None or follower is None or not is_channel_vector(other_input(follower, cast.outputs[0])):
        return value
    body.append(cast)
    return cast.outputs[0]


def _affine_step(value: ir.Value, op_type: str, body: list[ir.Node]) -> tuple[Site | None, ir.Value]:
    user = only_user(value, op_type)
    constant = None if user is None else other_input(user, value)
    if user is None or not is_channel_vector(constant):
        return None, value
    body.append(user)
    return (user, 1 if user.inputs[1] is constant else 0), user.outputs[0]
