"""absorb-bias: the part of a ReLU's input that is always there goes into the bias behind it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe import MinMax, MinMaxStat, Probe
from qcompile.calib.observe.change import Changes
from qcompile.decide.decisions import settled
from qcompile.ir.edit import add_constant, erase, insert_after, new_node, replace_value, set_constant
from qcompile.ir.model import Model
from qcompile.ir.notes import channel_stats, move_channel_stats
from qcompile.ir.ops import const_array, const_scalar, input_at, is_op, output_activation_axis, pads_zeros, weight_slot
from qcompile.pipeline.base import Kind, PassContext
from qcompile.pipeline.site import Applied, Missed, SitePass
from qcompile.rewrite.bias import bias_site, mean_output, shift_bias, weight_array
from qcompile.structure.core import Matches, Refusal, label, once, only_user

F64 = NDArray[np.float64]
_LAYERS = ("Conv", "Gemm", "MatMul")
_DEVIATIONS = 3.0
_PAYS = 0.01  # a least value below 1 % of the largest would hardly shrink the range


@dataclass(frozen=True, eq=False)
class Pair:
    """first -> z -> activation (Relu, or Clip from 0) [-> cap (Min with a constant)] -> second."""

    first: ir.Node
    z: ir.Value
    activation: ir.Node
    cap: ir.Node | None
    second: ir.Node


@dataclass(frozen=True)
class AbsorbBias(SitePass[Pair]):
    """Take high biases out of ReLU outputs: max(z, 0) with z >= k becomes max(z - k, 0) + k, and + k the next bias.

    before: Conv(W1, c1) -> ReLU -> Conv(W2, c2)
    after:  Conv(W1, c1 - k) -> ReLU -> Conv(W2, c2 + sum W2 k)   (Nagel et al. 2019, arXiv:1906.04721, section 4.1.3)
    by=bn: k = max(0, beta - 3 |gamma|), without data, from folded BatchNormalization; by=data: k = max(0, min z), the least
    value on calibration data, on which the function stays what it was.
    The range of the activation shrinks by k.  Not exact where z < k; `equalize{center}` is, for one Max instead of the ReLU.
    Weight-side on every target; a ReLU6 becomes Relu and Min with its bound 6 - k.
    Refused: other activations, outputs with several readers, and a second convolution that pads with zeros, which would have
    to be -k.
    """

    name = "absorb-bias"
    kind = Kind.FIT
    by: Annotated[Literal["data", "bn"], "where the least value of a channel comes from"] = "data"

    def sites(self, model: Model, ctx: PassContext) -> Matches[Pair]:
        """Layers behind which a ReLU and another layer stand."""
        return find_pairs(model.graph)

    def node(self, site: Pair) -> ir.Node:
        """The first layer."""
        return site.first

    def nodes(self, site: Pair) -> Iterable[ir.Node]:
        """Both layers."""
        return (site.first, site.second)

    def asks(self, site: Pair, ctx: PassContext) -> Iterable[Probe[Any]]:
        """Per-channel extremes in front of the activation."""
        return (_probe(site),) if self.by == "data" else ()

    def rewrite(self, model: Model, site: Pair, ctx: PassContext, changes: Changes) -> Applied | Missed:
        """Move k out of the first bias into the second."""
        if (reason := settled(site.first) or settled(site.second)) is not None:
            return Missed(reason)
        k = self._least(site, ctx)
        shift = mean_output(site.second, weight_array(site.second), k) if k is not None else None
        if k is None or shift is None:
            return Missed("no BatchNormalization says how small it gets" if self.by == "bn" else "not measured")
        if not k.any():
            return Missed("no channel stays above 0")
        changes.move(set(_names(site)))
        first, second = bias_site(site.first), bias_site(site.second)
        assert first is not None and second is not None
        shift_bias(model.graph, first, -k)
        move_channel_stats(site.z, shift=-k)
        shift_bias(model.graph, second, shift)
        _lower_cap(model.graph, site, k)
        return Applied(f"absorbed into {site.second.name}", {"channels": int((k > 0).sum()), "largest": float(k.max())})

    def _least(self, pair: Pair, ctx: PassContext) -> F64 | None:
        """k of each channel, 0 where it is nothing beside the channel's range; None where nothing is known."""
        if self.by == "bn":
            stats = channel_stats(pair.z)
            return None if stats is None else _worth(stats.mean - _DEVIATIONS * stats.std, stats.mean + _DEVIATIONS * stats.std)
        stat = ctx.told.get(_probe(pair))
        return _worth(stat.lo, stat.hi) if stat is not None and stat.lo.ndim == 1 else None


def _worth(low: F64, high: F64) -> F64:
    return np.where(low > _PAYS * high, np.maximum(low, 0.0), 0.0)


@once
def find_pairs(graph: ir.Graph) -> Matches[Pair]:
    """Every layer behind which a ReLU stands, or why its bias must stay."""
    found: list[Pair | Refusal] = []
    for node in graph:
        z = input_at(node, 0)
        first = _layer_of(z) if z is not None and _is_relu(node) else None
        if z is not None and first is not None:
            found.append(_pair(first, z, node))
    pairs = tuple(p for p in found if isinstance(p, Pair))
    return Matches(pairs, tuple(p for p in found if isinstance(p, Refusal)))


def _is_relu(node: ir.Node) -> bool:
    return is_op(node, "Relu") or (is_op(node, "Clip") and const_scalar(input_at(node, 1)) == 0.0)


def _layer_of(z: ir.Value) -> ir.Node | None:
    """The layer whose output, its bias included, is z."""
    made = z.producer()
    if made is None:
        return None
    candidates = [made, *(v.producer() for v in made.inputs if v is not None)] if is_op(made, "Add") else [made]
    layers = (n for n in candidates if n is not None and is_op(n, *_LAYERS) and weight_slot(n) == 1)
    return next((n for n in layers if (site := bias_site(n)) is not None and site[0] is made), None)


def _pair(first: ir.Node, z: ir.Value, activation: ir.Node) -> Pair | Refusal:
    if only_user(z, activation.op_type) is not activation:
        return Refusal(first, f"its output has other readers than {label(activation)}")
    y, cap = activation.outputs[0], only_user(activation.outputs[0], "Min")
    if cap is not None and any(const_array(v) is not None for v in cap.inputs):
        y = cap.outputs[0]
    else:
        cap = None
    second = only_user(y, *_LAYERS)
    if second is None or second.inputs[0] is not y or weight_slot(second) != 1 or bias_site(second) is None:
        return Refusal(first, "its activation does not feed one layer with a constant weight and bias alone")
    if pads_zeros(second):
        return Refusal(first, f"{label(second)} pads with zeros, which would have to be -k")
    return Pair(first, z, activation, cap, second)


def _probe(pair: Pair) -> Probe[MinMaxStat]:
    return MinMax(output_activation_axis(pair.first)).of(pair.z)


def _names(pair: Pair) -> Iterator[str]:
    nodes = (pair.first, pair.activation, *([pair.cap] if pair.cap is not None else []))
    yield from (str(v.name) for v in (pair.z, *(n.outputs[0] for n in nodes)))


def _lower_cap(graph: ir.Graph, pair: Pair, k: F64) -> None:
    """min(., b) becomes min(., b - k)."""
    shape = (1, -1, *(1,) * (weight_array(pair.first).ndim - 2)) if is_op(pair.first, "Conv") else (-1,)
    if pair.cap is not None:
        slot = next(i for i, v in enumerate(pair.cap.inputs) if const_array(v) is not None)
        bound = const_array(pair.cap.inputs[slot])
        assert bound is not None
        set_constant(pair.cap, slot, bound.astype(np.float64) - k.reshape(shape))
    elif is_op(pair.activation, "Clip") and (top := const_scalar(input_at(pair.activation, 2))) is not None:
        clip, y = pair.activation, pair.activation.outputs[0]
        dtype = y.dtype.numpy() if y.dtype is not None else np.dtype(np.float32)
        bound = add_constant(graph, f"{clip.name}_cap", (top - k.reshape(shape)).astype(dtype))
        relu = new_node(graph, "Relu", [pair.z], name=f"{clip.name}_low", like=y)
        cap = new_node(graph, "Min", [relu.outputs[0], bound], name=f"{clip.name}_cap", like=y)
        insert_after(graph, y, relu, cap)
        replace_value(graph, y, cap.outputs[0])
        erase(graph, clip)
