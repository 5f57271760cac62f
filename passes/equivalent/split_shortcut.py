"""split-shortcut: joined channels of unlike ranges get quantizers of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe import MinMax, MinMaxStat, Moments, MomentsStat, Probe
from qcompile.calib.observe.change import Changes
from qcompile.ir.edit import add_constant, erase, erase_dead, new_node, replace_value
from qcompile.ir.model import Model
from qcompile.ir.notes import copy_notes
from qcompile.ir.ops import const_array, input_at, int_attr, is_op, weight_slot
from qcompile.ir.optable import ops_with
from qcompile.ir.shapes import dims, rank
from qcompile.pipeline.base import Kind, PassContext
from qcompile.pipeline.site import Applied, Missed, SitePass
from qcompile.quant.qtype import QType
from qcompile.quant.spec import Scheme
from qcompile.structure import Matches, Norm, find_activations, find_norms
from qcompile.structure.core import data_uses, label, once

F64 = NDArray[np.float64]
_PASSES_CHANNELS = ops_with("activation") | ops_with("copies") | {"Clip", "Sigmoid", "Tanh"}
_MAX_DEPTH = 12


@dataclass(frozen=True, eq=False)
class Shortcut:
    """A convolution or matrix product `node` that reads channels joined by `concat`: `sizes` in order, at `axis` of its input.

    `parts` are the joined tensors where the node reads the Concat itself, else None (a norm or an activation stands between).
    """

    node: ir.Node
    concat: ir.Node
    sizes: tuple[int, ...]
    axis: int
    parts: tuple[ir.Value, ...] | None

    @property
    def input(self) -> ir.Value:
        """The tensor that is split."""
        value = self.node.inputs[0]
        assert value is not None
        return value


@dataclass(frozen=True)
class SplitShortcut(SitePass[Shortcut]):
    """Split a layer that reads joined channels: one branch, and so one activation and weight scale, for each part.

    before: Concat(a, b) -> [norm, activation] -> Conv(W, c)
    after:  Conv_a(a, W[:, :n]) + Conv_b(b, W[:, n:]) + c, c in the first branch only
    y = [a | b] W + c = a W_a + b W_b + c (Q-Diffusion, arXiv:2302.04304, section 4.3).  Concats of Concats are followed.
    Where float operators stand in between, their output is cut by a Split.  A grouped convolution is cut at group borders
    only, its outputs joined.
    Exact in float on every target, at the cost of a second kernel and an Add.
    Skipped where the layer's output would gain less than `gain`.  Its error is predicted from the calibration data: a step of a
    scale is its largest value over 2^(b-1), rounded values err by step^2 / 12, and meet the weights' (the inputs') squares.
    """

    name = "split-shortcut"
    kind = Kind.EQUIVALENT
    gain: Annotated[float, "least gain of the layer's output that is worth a second kernel and an Add, in dB"] = 1.0

    def __post_init__(self) -> None:
        self.check_range("gain", 0.0, 200.0)

    def sites(self, model: Model, ctx: PassContext) -> Matches[Shortcut]:
        """Layers behind channel Concats."""
        return find_shortcuts(model.graph)

    def node(self, site: Shortcut) -> ir.Node:
        """The layer."""
        return site.node

    def asks(self, site: Shortcut, ctx: PassContext) -> Iterable[Probe[Any]]:
        """Per-channel extremes and energies of what is split."""
        return _probes(site)

    def rewrite(self, model: Model, site: Shortcut, ctx: PassContext, changes: Changes) -> Applied | Missed:
        """Split the layer if its parts differ."""
        if reason := _refusal(site):
            return Missed(reason)
        gain = _gain_db(site, ctx)
        if gain is not None and gain < self.gain:
            return Missed("scales of their own would gain the joined parts too little", {"gain_db": round(gain, 2)})
        split(model.graph, site)
        sizes = " + ".join(map(str, site.sizes))
        return Applied(f"split into branches of {sizes} channels", {} if gain is None else {"gain_db": round(gain, 2)})

    def finish(self, model: Model) -> None:
        """Drop the Concats that nothing reads any more."""
        erase_dead(model)


@once
def find_shortcuts(graph: ir.Graph) -> Matches[Shortcut]:
    """Every layer behind a channel Concat."""
    found: list[Shortcut] = []
    norms = {part: n for n in find_norms(graph) if n.kind == "group" for part in n.nodes}
    activations = {part: a.output for a in find_activations(graph) for part in a.nodes}
    seen: set[ir.Node] = set()
    for concat in graph:
        axis = _channel_axis(concat)
        sizes = _sizes(concat, axis) if axis is not None else None
        if axis is None or sizes is None or _joined_again(concat, axis):
            continue
        for node, direct in _layers(concat.outputs[0], axis, norms, activations, _MAX_DEPTH):
            if node not in seen:
                seen.add(node)
                parts, counts = _parts(concat, axis)
                found.append(Shortcut(node, concat, tuple(counts), axis, tuple(parts) if direct else None))
    return Matches(tuple(found))


def _channel_axis(node: ir.Node) -> int | None:
    """1 for convolutions, the last axis for matrix products; None for any other Concat."""
    known = rank(node.outputs[0]) if is_op(node, "Concat") else None
    if known is None or known < 3:
        return None
    axis = int_attr(node, "axis", 0) % known
    return axis if axis in (1, known - 1) else None


def _joined_again(concat: ir.Node, axis: int) -> bool:
    uses = data_uses(concat.outputs[0])
    return bool(uses) and all(_channel_axis(n) == axis for n, _ in uses)


def _sizes(concat: ir.Node, axis: int) -> list[int] | None:
    sizes = [(dims(v) or ())[axis] if len(dims(v) or ()) > axis else None for v in concat.inputs]
    known = [s for s in sizes if isinstance(s, int)]
    return known if len(known) == len(sizes) > 1 else None


def _parts(concat: ir.Node, axis: int) -> tuple[list[ir.Value], list[int]]:
    """The joined tensors and their channels, through Concats that only this one reads."""
    parts: list[ir.Value] = []
    counts: list[int] = []
    for value, size in zip(concat.inputs, _sizes(concat, axis) or [], strict=True):
        assert value is not None
        maker = value.producer()
        if maker is not None and _channel_axis(maker) == axis and _sizes(maker, axis) is not None:
            inner, inner_counts = _parts(maker, axis)
            parts, counts = parts + inner, counts + inner_counts
        else:
            parts, counts = [*parts, value], [*counts, size]
    return parts, counts


def _layers(
    value: ir.Value, axis: int, norms: dict[ir.Node, Norm], activations: dict[ir.Node, ir.Value], depth: int
) -> Iterator[tuple[ir.Node, bool]]:
    """(layer, whether it reads `value` itself) through group norms and activations, which keep the channels apart."""
    behind: dict[ir.Value, None] = {}
    for node, slot in data_uses(value):
        if slot == 0 and is_op(node, "Conv", "MatMul", "Gemm") and weight_slot(node) == 1 and _reads(node, axis):
            yield node, True
        elif node in norms and norms[node].input is value and axis == 1:
            behind[norms[node].output] = None
        elif node in activations:
            behind[activations[node]] = None
        elif is_op(node, *_PASSES_CHANNELS) and slot == 0:
            behind[node.outputs[0]] = None
    for out in behind if depth else ():
        yield from ((node, False) for node, _ in _layers(out, axis, norms, activations, depth - 1))


def _reads(node: ir.Node, axis: int) -> bool:
    return (axis == 1) == is_op(node, "Conv") and not int_attr(node, "transA", 0)


def _refusal(site: Shortcut) -> str | None:
    bias = input_at(site.node, 2)
    if bias is not None and const_array(bias) is None:
        return f"the bias of {label(site.node)} is not constant"
    if is_op(site.node, "Conv") and (group := int_attr(site.node, "group", 1)) > 1:
        each = sum(site.sizes) // group
        if any(size % each for size in site.sizes):
            return f"{label(site.node)} has groups of {each} channels that reach over the border of the parts"
    return None


def _probes(site: Shortcut) -> tuple[Probe[MinMaxStat], Probe[MomentsStat]]:
    axis = 1 if is_op(site.node, "Conv") else -1
    return MinMax(axis).of(site.input), Moments(axis).of(site.input)


def _gain_db(site: Shortcut, ctx: PassContext) -> float | None:
    """By how much the predicted error of the output would fall; None where the channels were not measured."""
    extremes, sums = _probes(site)
    ends, moments = ctx.told.get(extremes), ctx.told.get(sums)
    if ends is None or moments is None or ends.lo.shape != (sum(site.sizes),) or not moments.count:
        return None
    tops, energy = np.maximum(-ends.lo, ends.hi), moments.sumsq / moments.count
    joint, apart = (_error(site, sizes, tops, energy, ctx.scheme) for sizes in ((sum(site.sizes),), site.sizes))
    return 10 * float(np.log10((joint + 1e-300) / (apart + 1e-300)))


def _error(site: Shortcut, sizes: Sequence[int], tops: F64, energy: F64, scheme: Scheme) -> float:
    """Squared error of an output with one scale for each run of `sizes` channels; small floats err by their own size anywhere."""
    weight, ends = _by_input(site.node), np.cumsum(sizes)[:-1]
    rounded = [_step(scheme.activation, top.max()) ** 2 * np.square(w).sum() for top, w in _parts_of((tops, weight), ends)]
    if _grouped(site.node):  # its outputs have scales of their own in any case
        return float(sum(rounded))
    parts = _parts_of((energy, weight), ends)
    return float(
        sum(rounded) + sum((_step(scheme.weight, np.abs(w).max((0, 2))) ** 2).sum() * w.shape[2] * e.sum() for e, w in parts)
    )


def _parts_of(arrays: tuple[F64, F64], ends: NDArray[np.intp]) -> list[tuple[F64, F64]]:
    return list(zip(*(np.split(a, ends) for a in arrays), strict=True))


def _step(qtype: QType | None, top: Any) -> F64:
    return np.asarray(top, np.float64) / 2.0 ** (qtype.bits - 1) if qtype is not None and qtype.family == "int" else np.zeros(())


def _by_input(node: ir.Node) -> F64:
    """The weight [C, outputs that read the channel, taps]."""
    weight = const_array(node.inputs[1])
    assert weight is not None
    wide, groups = weight.astype(np.float64), int_attr(node, "group", 1) if is_op(node, "Conv") else 1
    if not is_op(node, "Conv"):
        return (wide.T if int_attr(node, "transB", 0) else wide)[:, :, None]
    each = wide.reshape(groups, len(wide) // groups, wide.shape[1], -1).swapaxes(1, 2)
    return each.reshape(-1, *each.shape[2:])


def split(graph: ir.Graph, site: Shortcut) -> None:
    """Replace the layer by one branch a part; the sum (or, of a grouped convolution, the join) takes its place."""
    node, out = site.node, site.node.outputs[0]
    made = _cut(graph, site) if site.parts is None else []
    parts = list(made[0].outputs) if made else list(site.parts or ())
    branches = [_branch(graph, site, i, part) for i, part in enumerate(parts)]
    joined = _join(graph, site, branches)
    graph.insert_before(node, [*made, *branches, *joined])
    replace_value(graph, out, joined[-1].outputs[0])
    erase(graph, node)


def _cut(graph: ir.Graph, site: Shortcut) -> list[ir.Node]:
    sizes = add_constant(graph, f"{site.node.name}_sizes", np.array(site.sizes, np.int64))
    cut = new_node(
        graph,
        "Split",
        [site.input, sizes],
        name=f"{site.node.name}_split",
        attributes={"axis": site.axis},
        outputs=len(site.sizes),
    )
    for out, size in zip(cut.outputs, site.sizes, strict=True):
        out.type = site.input.type
        if site.input.shape is not None:
            out.shape = ir.Shape([size if i == site.axis else d for i, d in enumerate(site.input.shape)])
    return [cut]


def _branch(graph: ir.Graph, site: Shortcut, index: int, part: ir.Value) -> ir.Node:
    """The layer on the channels of one part."""
    node, name = site.node, f"{site.node.name}_part{index}"
    start, stop = sum(site.sizes[:index]), sum(site.sizes[: index + 1])
    weight, bias, attributes = _taken(site, start, stop, first=index == 0)
    inputs = [part, add_constant(graph, f"{name}_weight", weight, _dtype(node, 1))]
    if bias is not None:
        inputs.append(add_constant(graph, f"{name}_bias", bias, _dtype(node, 2)))
    made = new_node(graph, node.op_type, inputs, name=name, like=None if _grouped(node) else node.outputs[0])
    made.attributes.update({k: v for k, v in node.attributes.items() if k != "group"})
    made.attributes.update({k: ir.AttrInt64(k, v) for k, v in attributes.items()})
    copy_notes(node, made)
    made.outputs[0].type = node.outputs[0].type
    return made


def _taken(site: Shortcut, start: int, stop: int, *, first: bool) -> tuple[NDArray[Any], NDArray[Any] | None, dict[str, int]]:
    """Weight, bias and group count of the branch that reads the input channels start .. stop."""
    node = site.node
    weight, bias = const_array(node.inputs[1]), const_array(input_at(node, 2))
    assert weight is not None
    if _grouped(node):
        groups = int_attr(node, "group", 1)
        each, made = sum(site.sizes) // groups, len(weight) // groups
        rows = slice(start // each * made, stop // each * made)
        return weight[rows], None if bias is None else bias[rows], {"group": (stop - start) // each}
    axis = 1 if is_op(node, "Conv") or int_attr(node, "transB", 0) else 0
    return np.take(weight, np.arange(start, stop), axis), bias if first else None, {}


def _dtype(node: ir.Node, slot: int) -> ir.DataType | None:
    value = node.inputs[slot]
    return None if value is None else value.dtype


def _grouped(node: ir.Node) -> bool:
    return is_op(node, "Conv") and int_attr(node, "group", 1) > 1


def _join(graph: ir.Graph, site: Shortcut, branches: list[ir.Node]) -> list[ir.Node]:
    out, name = site.node.outputs[0], str(site.node.name)
    if _grouped(site.node):
        return [
            new_node(graph, "Concat", [b.outputs[0] for b in branches], name=f"{name}_join", like=out, attributes={"axis": 1})
        ]
    sums: list[ir.Node] = []
    total = branches[0].outputs[0]
    for i, branch in enumerate(branches[1:]):
        sums.append(new_node(graph, "Add", [total, branch.outputs[0]], name=f"{name}_sum{i}", like=out))
        total = sums[-1].outputs[0]
    return sums
