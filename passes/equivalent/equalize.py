"""equalize: channels of one range between convolutions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe import MinMax, MinMaxStat, Probe
from qcompile.calib.observe.change import AffineMap, Changes
from qcompile.ir.edit import add_constant, erase, new_node, replace_value, set_constant
from qcompile.ir.model import Model
from qcompile.ir.notes import move_channel_stats
from qcompile.ir.ops import const_array, const_scalar, is_op, pads_zeros
from qcompile.pipeline.base import Kind, PassContext
from qcompile.pipeline.site import Applied, Missed, SitePass
from qcompile.rewrite.ahead import Ahead, depthwise, fold_ahead, gain_db, tensors_ahead
from qcompile.rewrite.bias import (
    bias_at,
    bias_site,
    by_input,
    by_output,
    input_tops,
    mean_output,
    set_bias,
    shift_bias,
    weight_array,
)
from qcompile.structure import ConvChain, Matches, find_conv_chains

F64 = NDArray[np.float64]
_HOMOGENEOUS = ("relu", "leaky-relu", "relu6")
_ROUNDS, _CONVERGED = 50, 1.01
_PAYS = 1.1  # ranges within 10 % of each other are left alone
_MUL_PAYS_DB = 6.0  # a bit a channel; TensorRT fuses a Mul behind an activation
_MUL_PAYS_DB_CPU = 12.0  # it costs time on the CPU provider


@dataclass(frozen=True)
class CrossLayerEqualization(SitePass[ConvChain | Ahead]):
    """Give the channels between two convolutions one range: Conv1 -> ReLU -> Conv2 becomes Conv1 / s -> ReLU -> Conv2 * s.

    before: Conv(W1, c1) -> ReLU(6) -> Conv(W2)
    after:  Conv(W1 / s, c1 / s - t) -> max(., -t), min(., 6 / s - t) -> Conv(W2 * s, c2 + t sum W2)
    f(s x) = s f(x) for ReLU, LeakyReLU and none (Nagel et al. 2019, arXiv:1906.04721, section 4.1); ReLU6 keeps its bound, 6 / s.
    by=weights: s = sqrt(r1 r2) / r2 with r1, r2 the largest weights of the channel in W1 and W2 (eq. 11), repeated over all
    pairs until they agree (so depthwise triples reach r1 = r2 = r3).
    by=activations: in front of a depthwise convolution s = max|x_c|, which its per-channel weight scales absorb, so that one
    scale a tensor is as good as one a channel; else s = max|x_c|^alpha / max|W2_c|^(1 - alpha) (SmoothQuant).
    Exact in float on every target; ReLU6 and centred ReLU become Max and Min with a constant.
    Behind another activation (HardSwish, SiLU) or a sum, a Mul by 1 / s is put in front of the depthwise convolution alone
    (`insert`), where its channels gain a bit each on the mean (two on `ort`).
    center: t = half of each channel's range, exact in front of convolutions without padding; symmetric codes regain the sign
    bit that ReLU leaves unused: Clip(z, 0, 6) - 3 = Clip(z - 3, -3, 3).
    Refused: other activations in front of dense convolutions, outputs with several readers, transposed convolutions.
    """

    name = "equalize"
    kind = Kind.EQUIVALENT
    by: Annotated[Literal["activations", "weights"], "which ranges are made equal"] = "activations"
    # SQNR on MobileNet's calibration data (w8a8, with bias-correct): 15.7, 16.7, 17.4, 17.3 dB at 0.3, 0.5, 0.7, 0.9.
    alpha: Annotated[float, "how much of a dense layer's range moves into its weights, in [0, 1]"] = 0.7
    # Any other s moves MobileNet's outputs by 3e-6 to 5e-6: one unit in the last place of every weight does that too.
    steps: Annotated[int, "values of s in an octave; 1: powers of two, exact in floating point"] = 1
    center: Annotated[bool, "take half of the range out of ReLU outputs where that is exact"] = True

    insert: Annotated[bool, "put a Mul in front of depthwise convolutions that no fold reaches (by=activations)"] = True

    def __post_init__(self) -> None:
        self.check_range("alpha", 0.0, 1.0)
        self.check_range("steps", 1, 1024)

    def sites(self, model: Model, ctx: PassContext) -> Matches[ConvChain | Ahead]:
        """Pairs of convolutions with nothing but an activation in between; what else feeds depthwise convolutions."""
        chains = find_conv_chains(model.graph)
        if self.by == "weights" or not self.insert:
            return Matches[ConvChain | Ahead](chains.found, chains.refused)
        folded = {c.second for c in chains if _refusal(c) is None}
        kept = tuple(c for c in chains if c.second in folded or not depthwise(c.second))
        return Matches[ConvChain | Ahead]((*kept, *tensors_ahead(model.graph, folded)), chains.refused)

    def node(self, site: ConvChain | Ahead) -> ir.Node:
        """The first convolution, or the first that reads."""
        return site.convs[0] if isinstance(site, Ahead) else site.first

    def nodes(self, site: ConvChain | Ahead) -> Iterable[ir.Node]:
        """The convolutions."""
        return site.convs if isinstance(site, Ahead) else (site.first, site.second)

    def asks(self, site: ConvChain | Ahead, ctx: PassContext) -> Iterable[Probe[Any]]:
        """Per-channel extremes in front of the second convolution."""
        return (_probe(site),) if self.by == "activations" or self.center else ()

    def rewrites(
        self, model: Model, sites: Sequence[ConvChain | Ahead], ctx: PassContext, changes: Changes
    ) -> Iterator[Applied | Missed]:
        """Equalize every pair; by weights all together, since a convolution may stand in two."""
        reasons = {site: _refusal(site) for site in sites if isinstance(site, ConvChain)}
        usable = [site for site, reason in reasons.items() if reason is None]
        equal = iter(_equal_weights(usable) if self.by == "weights" else [np.ones(0)] * len(usable))
        for site in sites:
            if isinstance(site, Ahead):
                yield _ahead(model.graph, site, ctx, changes)
            elif (reason := reasons[site]) is not None:
                yield Missed(reason)
            else:
                yield self._one(model.graph, site, next(equal), ctx, changes)

    def _one(self, graph: ir.Graph, chain: ConvChain, by_weights: F64, ctx: PassContext, changes: Changes) -> Applied | Missed:
        channels = len(weight_array(chain.first))
        stat = ctx.told.get(_probe(chain))
        if stat is not None and stat.lo.shape != (channels,):
            return Missed("the measured channels do not match its weight")
        s = _rounded(by_weights if by_weights.size else self._scales(chain, stat), self.steps)
        t = self._centre(chain, stat, s, ctx)
        spread = float(s.max() / s.min())
        if spread < _PAYS and not t.any():
            return Missed("its channels have like ranges", {"spread": round(spread, 2)})
        moved = set(_names(chain))
        out = _fold(graph, chain, s, t)
        changes.map([str(out.name)], AffineMap(s, t * s))
        changes.move(moved)
        reason = f"equalized into {chain.second.name}" + (", centred" if t.any() else "")
        return Applied(reason, {"s_min": float(s.min()), "s_max": float(s.max())})

    def _scales(self, chain: ConvChain, stat: MinMaxStat | None) -> F64:
        assert stat is not None
        top, r2 = np.maximum(-stat.lo, stat.hi), input_tops(chain.second, weight_array(chain.second))
        if depthwise(chain.second):
            return _clean(top, np.ones_like(top))
        return _clean(np.maximum(top, 0) ** self.alpha, np.maximum(r2, 0) ** (1 - self.alpha))

    def _centre(self, chain: ConvChain, stat: MinMaxStat | None, s: F64, ctx: PassContext) -> F64:
        """Half of each channel's range after the division by s, where the second convolution pads nothing."""
        bounded = chain.activation is None or chain.activation.kind in ("relu", "relu6")
        if not self.center or stat is None or not bounded:
            return np.zeros_like(s)
        if pads_zeros(chain.second):
            ctx.remarks.note(str(chain.first.name), f"not centred: {chain.second.name} pads with zeros, its border would need -t")
            return np.zeros_like(s)
        return (stat.lo + stat.hi) / 2 / s


def _equal_weights(chains: list[ConvChain]) -> list[F64]:
    """s of each pair (eq. 11), repeated on copies of the weights until no pair moves by 1 %."""
    weights = {node: weight_array(node) for c in chains for node in (c.first, c.second)}
    scales = [np.ones(len(weights[c.first])) for c in chains]
    for _ in range(_ROUNDS):
        moved = 1.0
        for i, c in enumerate(chains):
            r1, r2 = _row_tops(weights[c.first]), input_tops(c.second, weights[c.second])
            s = _clean(np.sqrt(r1 * r2), r2)
            scales[i] = scales[i] * s
            weights[c.first] /= by_output(c.first, s)
            weights[c.second] *= by_input(c.second, s)
            moved = max(moved, float(s.max() / s.min()))
        if moved < _CONVERGED:
            break
    return scales


def _row_tops(weight: F64) -> F64:
    return np.abs(weight.reshape(len(weight), -1)).max(1)


def _clean(numerator: F64, denominator: F64) -> F64:
    """The ratio with geometric mean 1, dead channels left alone."""
    alive = (numerator > 1e-8 * numerator.max(initial=0.0)) & (denominator > 1e-8 * denominator.max(initial=0.0))
    if not alive.any():
        return np.ones_like(numerator)
    s = np.where(alive, numerator, 1.0) / np.where(alive, denominator, 1.0)
    return np.where(alive, s / np.exp(np.log(s[alive]).mean()), 1.0)


def _rounded(s: F64, steps: int) -> F64:
    """The nearest 2^(k / steps) inside [2^-10, 2^10]."""
    return np.exp2(np.rint(np.clip(np.log2(s), -10, 10) * steps) / steps)


def _probe(site: ConvChain | Ahead) -> Probe[MinMaxStat]:
    value = site.tensor if isinstance(site, Ahead) else site.second.inputs[0]
    assert value is not None
    return MinMax(1).of(value)


def _names(chain: ConvChain) -> Iterable[str]:
    yield from (str(v.name) for v in chain.first.outputs)
    if chain.activation is not None:
        yield from (str(v.name) for n in chain.activation.nodes for v in n.outputs)


def _refusal(chain: ConvChain) -> str | None:
    if not is_op(chain.first, "Conv") or not is_op(chain.second, "Conv"):
        return "a transposed convolution is part of the pair"
    if chain.batch_norm is not None:
        return "a BatchNormalization stands in between: run fold-bn"
    if chain.activation is not None and chain.activation.kind not in _HOMOGENEOUS:
        return f"{chain.activation.kind} is not positively homogeneous"
    if chain.activation is not None and len(chain.activation.nodes) != 1:
        return "its activation is spread over several nodes"
    odd = next((node for node in (chain.first, chain.second) if bias_site(node) is None), None)
    return None if odd is None else f"the bias of {odd.name} is not constant"


def _ahead(graph: ir.Graph, site: Ahead, ctx: PassContext, changes: Changes) -> Applied | Missed:
    """A Mul in front of depthwise convolutions, if it pays."""
    stat = ctx.told[_probe(site)]
    if stat.lo.shape != (len(weight_array(site.convs[0])),):
        return Missed("the measured channels do not match its weight")
    top = np.maximum(-stat.lo, stat.hi)
    s = _clean(top, np.ones_like(top))
    s = _rounded(np.where(top > 1e-8 * top.max(initial=0.0), s / s.max(initial=0.0), 1.0), 1)
    gain = gain_db(s)
    if gain < (_MUL_PAYS_DB if ctx.target.fuses_elementwise else _MUL_PAYS_DB_CPU):
        return Missed("a Mul in front of it would hardly pay: its channels have like ranges", {"gain_db": round(gain, 2)})
    fold_ahead(graph, site, s, changes)
    return Applied("its channels equalized by a Mul", {"s_min": float(s.min()), "gain_db": round(gain, 2)})


def _fold(graph: ir.Graph, chain: ConvChain, s: F64, t: F64) -> ir.Value:
    """Rewrite the pair; returns the tensor between the activation and the second convolution."""
    first, second = chain.first, chain.second
    set_constant(first, 1, weight_array(first) / by_output(first, s))
    set_bias(graph, (first, 2), bias_at((first, 2), s.size) / s - t)
    move_channel_stats(first.outputs[0], 1 / s, -t)
    stretched = weight_array(second) * by_input(second, s)
    set_constant(second, 1, stretched)
    shift = mean_output(second, stretched, t)
    assert shift is not None
    if t.any():
        shift_bias(graph, (second, 2), shift)
    return _bounded(graph, chain, s, t)


def _bounded(graph: ir.Graph, chain: ConvChain, s: F64, t: F64) -> ir.Value:
    """The activation with bounds of each channel: max(z, -t) for ReLU, and min(z, 6 / s - t) for ReLU6."""
    value = chain.second.inputs[0]
    assert value is not None
    act = chain.activation
    if act is None or act.kind == "leaky-relu" or (act.kind == "relu" and not t.any()):
        return value
    node, source = act.node, act.input
    top = 6.0 if len(node.inputs) < 3 else const_scalar(node.inputs[2])
    bounds = [("Max", -t)] + ([("Min", (top or 6.0) / s - t)] if act.kind == "relu6" else [])
    made: list[ir.Node] = []
    weight = const_array(chain.first.inputs[1])
    assert weight is not None
    dtype, shape = weight.dtype, (1, -1, *(1,) * (weight.ndim - 2))
    for op, bound in bounds:
        if op == "Max" and not t.any():
            made.append(new_node(graph, "Relu", [source], name=f"{node.name}_low", like=value))
        else:
            constant = add_constant(graph, f"{node.name}_{op.lower()}", bound.reshape(shape).astype(dtype))
            made.append(new_node(graph, op, [source, constant], name=f"{node.name}_{op.lower()}", like=value))
        source = made[-1].outputs[0]
    graph.insert_before(node, made)
    replace_value(graph, value, source)
    erase(graph, node)
    return source
