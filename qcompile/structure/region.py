"""Rotation regions: all values that hold one residual stream's channels, everything that writes them and all that reads them.

A linear map of the channel axis may be folded into the writers and undone in the readers, provided that every node in between
treats the channels alike: Adds, data movement, averages over tokens, one-number scalings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompile.ir import ops
from qcompile.ir.shapes import dims, rank
from qcompile.structure.channels.move import can_step, step
from qcompile.structure.channels.trace import is_scaling, start_layout
from qcompile.structure.core import Matches, Refusal, Site, data_uses, label, once
from qcompile.structure.folds import NormToLinears, match_norm_to_linears
from qcompile.structure.linear import Linear, linears_by_output, match_linear
from qcompile.structure.norm import Norm, find_norms
from qcompile.structure.stream import find_residual_streams


@dataclass(frozen=True)
class Constant:
    """A constant written into the stream: (node, slot), and its channel axis counted from the right (-1: the last)."""

    node: ir.Node
    slot: int
    axis: int


@dataclass(frozen=True)
class Region:
    """One stream of `channels` channels.

    `writers` end in it and `constants` are added, looked up or concatenated; `norms` read it through a norm whose output
    feeds only linears, `readers` are linears that read it directly.  `values` are the tensors in it.
    """

    channels: int
    values: tuple[ir.Value, ...]
    writers: tuple[Linear, ...]
    constants: tuple[Constant, ...]
    norms: tuple[NormToLinears, ...]
    readers: tuple[Linear, ...]

    @property
    def has_mean(self) -> bool:
        """Whether a LayerNorm reads the stream: the map must keep the mean over the channels."""
        return any(n.norm.kind != "rms" for n in self.norms)

    @property
    def anchor(self) -> ir.Node:
        """The node that stands for the region in remarks."""
        return self.norms[0].norm.node


@dataclass
class _Growth:
    """A region while it grows: values with their channel axis, and what was met at its border."""

    channels: int
    axes: dict[ir.Value, int] = field(default_factory=dict[ir.Value, int])
    queue: list[ir.Value] = field(default_factory=list[ir.Value])
    writers: dict[ir.Node, Linear] = field(default_factory=dict[ir.Node, Linear])
    constants: dict[Site, Constant] = field(default_factory=dict[Site, Constant])
    norms: dict[ir.Value, Norm] = field(default_factory=dict[ir.Value, Norm])
    readers: dict[ir.Node, Linear] = field(default_factory=dict[ir.Node, Linear])

    def add(self, value: ir.Value, axis: int) -> str | None:
        """Take `value` into the region; a reason if it would hold the channels on two axes."""
        known = self.axes.setdefault(value, axis)
        if known != axis:
            return f"{value.name} holds the channels on two axes"
        if value not in self.queue:
            self.queue.append(value)
        return None


class _Stop(Exception):
    """The region meets a node that a map of the channels cannot pass."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        self.refusal = Refusal(node, reason)


@once
def find_regions(graph: ir.Graph) -> Matches[Region]:
    """The region of every residual stream; a stream whose channels cannot be mapped is refused at the node that forbids it."""
    finder = _Finder(graph)
    found: list[Region] = []
    refused: list[Refusal] = []
    seen: set[ir.Value] = set()
    for stream in find_residual_streams(graph):
        start = stream.adds[0].outputs[0]
        if start in seen:
            continue
        try:
            region, values = finder.grow(start, stream.adds[0])
        except _Stop as stop:
            refused.append(stop.refusal)
            seen.update(stream.values)
            continue
        seen.update(values)
        found.append(region)
    return Matches(tuple(found), tuple(refused))


class _Finder:
    def __init__(self, graph: ir.Graph) -> None:
        self.linears = linears_by_output(graph)
        norms = list(find_norms(graph))
        self.made_by_norm = {norm.output: norm for norm in norms}
        self.norm_of = {part: norm for norm in norms for part in norm.nodes}

    def grow(self, start: ir.Value, anchor: ir.Node) -> tuple[Region, tuple[ir.Value, ...]]:
        """The region around `start`, whose last axis (or axis 1 between convolutions) holds the channels."""
        axis, channels = self._channels(start, anchor)
        growth = _Growth(channels)
        growth.add(start, axis)
        done: set[ir.Value] = set()
        while growth.queue:
            value = growth.queue.pop()
            if value in done:
                continue
            done.add(value)
            self._backward(value, growth)
            self._forward(value, growth)
        return self._region(growth, anchor), tuple(growth.axes)

    def _channels(self, value: ir.Value, anchor: ir.Node) -> tuple[int, int]:
        shape = dims(value)
        if shape is None or not shape:
            raise _Stop(anchor, "the rank of the residual stream is unknown: run canonicalize")
        channels = shape[-1]
        if not isinstance(channels, int):
            raise _Stop(anchor, "the channels of the residual stream are unknown: run canonicalize")
        return len(shape) - 1, channels

    # ---- towards the writers --------------------------------------------------------------------------------------

    def _backward(self, value: ir.Value, growth: _Growth) -> None:
        axis, node = growth.axes[value], value.producer()
        if node is None:
            raise _Stop(next(iter(data_uses(value)))[0], f"the graph input {value.name} is part of the stream")
        if value in self.linears:
            self._writer(self.linears[value], value, axis, growth)
        elif value in self.made_by_norm:
            raise _Stop(self.made_by_norm[value].node, "post-norm: a norm's output is the stream")
        elif ops.is_op(node, "Add", "Sub", "Concat"):
            self._joined(node, axis, growth)
        elif ops.is_op(node, "Gather") and ops.is_const(node.inputs[0]):
            self._table(node, axis, value, growth)
        elif (slot := _scaled(node)) is not None:
            self._input(node, slot, axis, growth)
        elif can_step(node, 0) or ops.is_op(node, "ReduceMean", "GlobalAveragePool"):
            self._moved_from(node, value, axis, growth)
        else:
            raise _Stop(node, f"{label(node)} writes the stream and is not a linear")

    def _writer(self, linear: Linear, value: ir.Value, axis: int, growth: _Growth) -> None:
        wanted = 1 if linear.channel_axis == 1 else (rank(value) or 0) - 1
        if axis != wanted or linear.out_channels != growth.channels:
            raise _Stop(linear.node, "its output channels are not the stream's")
        growth.writers[linear.node] = linear

    def _joined(self, node: ir.Node, axis: int, growth: _Growth) -> None:
        """Operands of Add and Sub broadcast from the right; a Concat must join another axis."""
        out_rank = rank(node.outputs[0]) or 0
        if node.op_type == "Concat" and ops.int_attr(node, "axis", 0) % max(out_rank, 1) == axis:
            raise _Stop(node, f"{label(node)} joins channels")
        for slot in range(len(node.inputs)):
            self._input(node, slot, axis, growth)

    def _input(self, node: ir.Node, slot: int, axis: int, growth: _Growth) -> None:
        """The operand at `slot` of a node whose output holds the channels at `axis` (aligned from the right)."""
        value = node.inputs[slot]
        from_right = axis - (rank(node.outputs[0]) or 0)
        if value is None:
            return
        if ops.is_const(value):
            growth.constants[(node, slot)] = Constant(node, slot, from_right)
            return
        own = rank(value)
        shape = dims(value)
        if own is None or shape is None or own + from_right < 0 or shape[own + from_right] != growth.channels:
            raise _Stop(node, f"{value.name} is broadcast over the channels")
        _taken(node, growth.add(value, own + from_right))

    def _table(self, node: ir.Node, axis: int, value: ir.Value, growth: _Growth) -> None:
        """An embedding table [entries, channels], looked up along axis 0."""
        shape = ops.static_shape(node.inputs[0])
        last = (rank(value) or 0) - 1
        if ops.int_attr(node, "axis", 0) != 0 or shape is None or len(shape) != 2 or axis != last:
            raise _Stop(node, f"{label(node)} does not look up whole rows")
        growth.constants[(node, 0)] = Constant(node, 0, -1)

    def _moved_from(self, node: ir.Node, value: ir.Value, axis: int, growth: _Growth) -> None:
        """The input axis that becomes `axis` of `value`."""
        source = node.inputs[0]
        if source is None:
            raise _Stop(node, f"{label(node)} has no input")
        if ops.is_const(source):
            shape, last = ops.static_shape(source) or (), (rank(value) or 0) - 1
            if shape[-1:] != (growth.channels,) or axis != last or not ops.is_op(node, "Expand", "Tile"):
                raise _Stop(node, f"{label(node)} moves a constant in an unknown way: run canonicalize")
            growth.constants[(node, 0)] = Constant(node, 0, -1)
            return
        for candidate in range(rank(source) or 0):
            if _axis_behind(node, source, candidate, growth.channels).get(value) == axis:
                _taken(node, growth.add(source, candidate))
                return
        raise _Stop(node, f"the channels cannot be followed through {label(node)}")

    # ---- towards the readers --------------------------------------------------------------------------------------

    def _forward(self, value: ir.Value, growth: _Growth) -> None:
        if value.is_graph_output():
            raise _Stop(value.producer() or next(iter(value.uses()))[0], f"the stream is the graph output {value.name}")
        for node, slot in data_uses(value):
            self._reader(value, node, slot, growth)

    def _reader(self, value: ir.Value, node: ir.Node, slot: int, growth: _Growth) -> None:
        axis = growth.axes[value]
        norm = self.norm_of.get(node)
        linear = match_linear(node)
        if norm is not None and norm.input is value:
            self._norm(norm, value, axis, growth)
        elif isinstance(linear, Linear) and slot == linear.input_slot:
            self._direct(linear, value, axis, growth)
        elif ops.is_op(node, "Add", "Sub", "Concat") or (ops.is_op(node, "Mul", "Div") and is_scaling(node, slot)):
            out, own = node.outputs[0], rank(value) or 0
            _taken(node, growth.add(out, (rank(out) or 0) - own + axis))
        elif can_step(node, slot) or ops.is_op(node, "ReduceMean", "GlobalAveragePool"):
            behind = _axis_behind(node, value, axis, growth.channels)
            if len(behind) < sum(bool(o.uses()) or o.is_graph_output() for o in node.outputs):
                raise _Stop(node, f"the channels cannot be followed through {label(node)}")
            for out, place in behind.items():
                _taken(node, growth.add(out, place))
        else:
            raise _Stop(node, f"{label(node)} reads the stream channel by channel")

    def _norm(self, norm: Norm, value: ir.Value, axis: int, growth: _Growth) -> None:
        if norm.kind == "group" or norm.axis != -1 or axis != (rank(value) or 0) - 1:
            raise _Stop(norm.node, "the norm does not run over the stream's channels alone")
        growth.norms[norm.output] = norm

    def _direct(self, linear: Linear, value: ir.Value, axis: int, growth: _Growth) -> None:
        wanted = 1 if linear.channel_axis == 1 else (rank(value) or 0) - 1
        if axis != wanted or linear.in_channels != growth.channels:
            raise _Stop(linear.node, f"{label(linear.node)} reads the channels in another order")
        growth.readers[linear.node] = linear

    def _region(self, growth: _Growth, anchor: ir.Node) -> Region:
        norms = list(_folds(growth))
        for constant in growth.constants.values():
            array = ops.const_array(constant.node.inputs[constant.slot])
            if array is None or array.dtype.kind not in "fV" or not _fits(array, constant.axis, growth.channels):
                raise _Stop(constant.node, f"{label(constant.node)} holds a constant of unknown form")
        if not norms:
            raise _Stop(anchor, "no norm reads the stream")
        return Region(
            growth.channels,
            tuple(growth.axes),
            tuple(growth.writers.values()),
            tuple(growth.constants.values()),
            tuple(norms),
            tuple(growth.readers.values()),
        )


def _folds(growth: _Growth) -> Iterator[NormToLinears]:
    for norm in growth.norms.values():
        match = match_norm_to_linears(norm)
        if isinstance(match, Refusal):
            raise _Stop(match.node, match.reason)
        beta = ops.const_array(norm.beta)
        if beta is not None and np.any(beta) and match.shift_refusal is not None:
            raise _Stop(norm.node, f"its beta cannot be folded: {match.shift_refusal}")
        if not _editable(norm):
            raise _Stop(norm.node, "its gain is not a constant")
        yield match


def _editable(norm: Norm) -> bool:
    return norm.gamma is None or ops.const_array(norm.gamma) is not None


def _fits(array: np.ndarray, axis: int, channels: int) -> bool:
    return array.ndim < -axis or array.shape[axis] in (1, channels)


def _scaled(node: ir.Node) -> int | None:
    """The slot of the data operand of a scaling by one number."""
    if not ops.is_op(node, "Mul", "Div"):
        return None
    return next((slot for slot in range(2) if is_scaling(node, slot) and not ops.is_const(node.inputs[slot])), None)


def _axis_behind(node: ir.Node, value: ir.Value, axis: int, channels: int) -> dict[ir.Value, int]:
    """Outputs of a movement node -> the axis that holds all channels in order."""
    layout = start_layout(value, channels, axis)
    shape = dims(value)
    if layout is None or shape is None or shape[axis] != channels:
        return {}
    moved = step(node, layout)
    if isinstance(moved, str):
        return {}
    found: dict[ir.Value, int] = {}
    for out, behind in moved:
        holding = [i for i in range(len(behind.axes)) if behind.holds_channels(i)]
        numbers = behind.columns(holding[0]) if len(holding) == 1 else None
        if numbers is not None and np.array_equal(numbers, np.arange(channels)):
            found[out] = holding[0]
    return found


def _taken(node: ir.Node, reason: str | None) -> None:
    if reason is not None:
        raise _Stop(node, reason)
