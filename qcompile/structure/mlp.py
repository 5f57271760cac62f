"""MLP blocks: fc1 -> activation -> fc2, plain or gated (SwiGLU, GeGLU)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.ir import ops
from qcompile.structure.activation import Activation, find_activations
from qcompile.structure.channels.trace import Trace, start_layout, trace
from qcompile.structure.core import Matches, Refusal, label, once, only_use, sorted_out
from qcompile.structure.folds import reads_in_order
from qcompile.structure.linear import Linear, linears_by_output, match_linear

_MAX_STEPS = 16


@dataclass(frozen=True)
class Mlp:
    """fc2 reads f(fc1(x)), or f(fc1(x)) * up(x) when gated; `hidden` is the value in front of fc2 (before the nodes of `path`).

    `fc2` reads the channels of `hidden` in order, and nothing else reads `hidden`: a Mul by 1/s or a Sub inserted behind it is
    undone in fc2's weight.  `up` shares fc1's linear when gate and up projection are packed in one weight (then `up is fc1`).
    """

    fc1: Linear
    activation: Activation
    fc2: Linear
    hidden: ir.Value
    path: tuple[ir.Node, ...]
    gate: ir.Node | None
    up: Linear | None
    shift_refusal: str | None

    @property
    def kind(self) -> str:
        """The activation's kind, or "swiglu" / "geglu" when gated."""
        if self.gate is None:
            return self.activation.kind
        return "swiglu" if self.activation.kind == "silu" else "geglu"

    @property
    def shift_ok(self) -> bool:
        """True if a shift of `hidden` may be compensated in fc2's bias."""
        return self.shift_refusal is None


@once
def find_mlps(graph: ir.Graph) -> Matches[Mlp]:
    """All MLP blocks, and the activations behind a linear whose output cannot be folded, with the reason."""
    linears = linears_by_output(graph)
    return sorted_out(match_mlp(activation, linears) for activation in find_activations(graph))


def match_mlp(activation: Activation, linears: dict[ir.Value, Linear]) -> Mlp | Refusal | None:
    """The MLP around one activation; None if its input does not come from a linear (or the two are parts of a CNN)."""
    fc1 = _linear_behind(activation.input, linears)
    if fc1 is None or not fc1.pointwise or activation.kind in ("sigmoid", "tanh"):
        return None
    gate, up = _gate(activation, linears)
    hidden = activation.output if gate is None else gate.outputs[0]
    channels = _channel_count(fc1, up)
    layout = None if channels is None else start_layout(hidden, channels, fc1.channel_axis)
    if channels is None or layout is None:
        return Refusal(activation.node, "the channels of its output are not known: run canonicalize")
    traced = trace(hidden, layout)
    reason = next(_reasons(traced, channels), None)
    if reason is not None:
        return Refusal(activation.node, reason) if fc1.kind != "conv" else None
    fc2 = match_linear(traced.arrivals[0].node)
    if not isinstance(fc2, Linear) or not fc2.pointwise or fc1.channel_axis != fc2.channel_axis:
        return None
    return Mlp(fc1, activation, fc2, hidden, traced.moved, gate, up, _shift_refusal(fc2, traced))


def _linear_behind(value: ir.Value | None, linears: dict[ir.Value, Linear]) -> Linear | None:
    for _ in range(_MAX_STEPS):
        if value is None or value in linears:
            break
        node = value.producer()
        if node is None or not (ops.is_data_movement(node) or ops.is_op(node, "Cast", "BatchNormalization")):
            return None
        value = node.inputs[0]
    return None if value is None else linears.get(value)


def _gate(activation: Activation, linears: dict[ir.Value, Linear]) -> tuple[ir.Node | None, Linear | None]:
    """The Mul with a second linear's output, when that is the activation's only consumer."""
    use = only_use(activation.output)
    if use is None or not ops.is_op(use[0], "Mul"):
        return None, None
    up = _linear_behind(use[0].inputs[1 - use[1]], linears)
    return (None, None) if up is None else (use[0], up)


def _channel_count(fc1: Linear, up: Linear | None) -> int | None:
    return fc1.out_channels // 2 if up is fc1 else fc1.out_channels


def _reasons(traced: Trace, channels: int) -> Iterator[str]:
    if traced.outputs:
        yield "its output is a graph output"
    for lost in traced.lost:
        yield lost.reason
    if len(traced.arrivals) != 1:
        yield f"its output feeds {len(traced.arrivals)} nodes"
        return
    end = traced.arrivals[0]
    linear = match_linear(end.node)
    if isinstance(linear, Refusal):
        yield f"consumer {label(end.node)}: {linear.reason}"
    elif linear is None:
        yield f"consumer {label(end.node)} is not a linear"
    elif end.slot != linear.input_slot or not reads_in_order(end, linear, channels):
        yield f"consumer {label(end.node)} does not read the channels in order"


def _shift_refusal(fc2: Linear, traced: Trace) -> str | None:
    if traced.filled:
        return f"{label(traced.filled[0])} writes a constant between the channels"
    return f"{label(fc2.node)} pads with zeros" if fc2.padded else None
