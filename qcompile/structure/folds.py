"""Norm -> linears: the places where a per-channel affine change of variable is free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.ir import ops
from qcompile.structure.channels.trace import Arrival, Trace, start_layout, trace
from qcompile.structure.core import Matches, Refusal, label, once, sorted_out
from qcompile.structure.linear import Linear, match_linear
from qcompile.structure.norm import Norm, find_norms

_MAX_REASONS = 3


@dataclass(frozen=True)
class NormToLinears:
    """Every consumer of the norm's output, behind the movement nodes `path`, is one of `linears` and reads its channels in order.

    So x' = (x - t) / r may be folded into the norm's gamma and beta and the linears' weights and biases.
    `shift_refusal` says why t must stay 0, or is None.
    """

    norm: Norm
    linears: tuple[Linear, ...]
    path: tuple[ir.Node, ...]
    shift_refusal: str | None

    @property
    def shift_ok(self) -> bool:
        """True if a shift t may be folded too."""
        return self.shift_refusal is None


@once
def find_norm_to_linears(graph: ir.Graph) -> Matches[NormToLinears]:
    """All legal fold sites, and for every other norm the reason (norms that `find_norms` refused included)."""
    norms = find_norms(graph)
    return sorted_out((match_norm_to_linears(norm) for norm in norms), norms.refused)


def match_norm_to_linears(norm: Norm) -> NormToLinears | Refusal:
    """The fold site of one norm, or why there is none."""
    count = norm.channels
    layout = None if count is None else start_layout(norm.output, count, norm.axis)
    if count is None or layout is None:
        return Refusal(norm.node, "its channel count or rank is unknown: run canonicalize")
    traced = trace(norm.output, layout)
    reasons = list(dict.fromkeys(_reasons(traced, count)))
    if reasons:
        return Refusal(norm.node, "; ".join(reasons[:_MAX_REASONS]))
    matches = [match_linear(a.node) for a in traced.arrivals]
    linears = tuple(m for m in matches if isinstance(m, Linear))
    return NormToLinears(norm, linears, traced.moved, _shift_refusal(norm, linears, traced))


def _reasons(traced: Trace, count: int) -> Iterator[str]:
    if traced.outputs:
        yield "norm output is a graph output"
    for arrival in sorted(traced.arrivals, key=lambda a: a.node.op_type != "Add"):
        yield from _arrival_reason(arrival, count)
    yield from (lost.reason for lost in traced.lost)
    if not (traced.arrivals or traced.lost or traced.outputs):
        yield "norm output is unused"


def _arrival_reason(arrival: Arrival, count: int) -> Iterator[str]:
    node = arrival.node
    if ops.is_op(node, "Add") and not any(ops.is_const(v) for v in node.inputs):
        yield f"feeds the residual {label(node)} (post-norm)"
        return
    match = match_linear(node)
    if isinstance(match, Refusal):
        yield f"consumer {label(node)}: {match.reason}"
    elif match is None:
        yield f"consumer {label(node)} is not a linear"
    elif arrival.slot != match.input_slot or not reads_in_order(arrival, match, count):
        yield f"consumer {label(node)} does not read the channels in order"


def reads_in_order(arrival: Arrival, linear: Linear, count: int) -> bool:
    """True if input channel i of `linear` is channel i of the traced value, for all `count` channels."""
    axis = linear.channel_axis
    index = arrival.layout.index(axis)
    numbers = None if index is None else arrival.layout.columns(index)
    if numbers is None or linear.in_channels != count or arrival.layout.offset:
        return False
    return len(numbers) == count and bool((numbers == np.arange(count)).all())


def _shift_refusal(norm: Norm, linears: tuple[Linear, ...], traced: Trace) -> str | None:
    if traced.filled:
        return f"{label(traced.filled[0])} writes a constant between the channels"
    padded = [linear.node for linear in linears if linear.padded]
    if padded:
        return f"{label(padded[0])} pads with zeros"
    return None if norm.beta_site is not None else "the norm has no beta"
