"""bias-correct: take the mean error of quantized layers out of their biases."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Annotated, Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe import Moments, MomentsStat, Probe, Stat, Told
from qcompile.decide.decisions import Use, clear_decisions, decisions, settled
from qcompile.decide.quantizer import value_at
from qcompile.ir.model import Model
from qcompile.ir.ops import activation_channel_axis, const_array, is_compute, is_op, output_activation_axis, weight_slot
from qcompile.passes.fit.bias_correct.bn_means import expected
from qcompile.pipeline.base import Kind, Needs, Pass, PassContext, PassResult, Rounds, Stage
from qcompile.rewrite.bias import bias_site, mean_output, shift_bias
from qcompile.rewrite.qdq import grouped, materialise

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class BiasCorrection(Pass):
    """Correct biases for the shift that rounding causes: c' = c - (Q(W) - W) E[x], or layer by layer from measured means.

    before: Conv(x, Q(W), c)    after: Conv(x, Q(W), c')
    empirical: E[x] on calibration data (Nagel et al. 2019, arXiv:1906.04721, section 4.2).  The squared error of the layer
    falls by the square of its mean, so it never rises on the calibration data.
    bn: E[x] without data, from the BatchNormalization in front: x = clip(N(beta, gamma^2)), through ReLU, ReLU6, average
    pooling and residual sums (section 4.2.1).  A model of x: nothing holds it to the data.
    sequential: c' = c + E[y] - E[y~] in order, y~ measured with everything in front quantized and corrected already
    (appendix D): rounded activations count too.  One sweep for each layer of the network's depth.
    Weight-side on every target, without a new node.
    Refuses layers without a bias that a constant could be added to; in mode=bn those behind no BatchNormalization.
    """

    name = "bias-correct"
    kind = Kind.FIT
    needs = Stage.FITTED
    mode: Annotated[Literal["empirical", "sequential", "bn"], "where the means come from"] = "empirical"

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """Per-channel means of the inputs (sequential: outputs) of quantized layers; of all layers before the decisions."""
        if self.mode == "bn":
            return ()
        probe = _output_probe if self.mode == "sequential" else _input_probe
        if any(True for _ in decisions(model.graph)):
            return dict.fromkeys(probe(node) for node, _, _ in _layers(model.graph))
        return dict.fromkeys(probe(node) for node in model.graph if is_compute(node) and weight_slot(node) == 1)

    def rounds(self, model: Model, ctx: PassContext) -> Rounds:
        """One after the other in mode=sequential: each level is measured behind the corrected ones in front of it."""
        for node in dict.fromkeys(use.node for use in _weights(model.graph) if use.quantizer.imported):
            ctx.remarks.missed(str(node.name), str(settled(node)))
        if self.mode == "sequential":
            return PassResult((yield from _Sequence(model, ctx).correct(list(_layers(model.graph)))))
        return self.apply(model, ctx)

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Correct every layer that has a bias."""
        layers = list(_layers(model.graph))
        done = [_correct(model.graph, layer, self._mean(layer[0], ctx), ctx) for layer in layers]
        return PassResult(any(done))

    def _mean(self, node: ir.Node, ctx: PassContext) -> F64 | str:
        """E[x] of each input channel, or why it is not known."""
        if self.mode == "bn":
            stats = expected(value_at(node, 0))
            return "no BatchNormalization says what its input is like" if stats is None else stats.mean
        stat = ctx.told.get(_input_probe(node))
        return "its input was not measured" if stat is None else stat.mean


def _layers(graph: ir.Graph) -> Iterator[Use]:
    return (use for use in _weights(graph) if not use.quantizer.imported)


def _weights(graph: ir.Graph) -> Iterator[Use]:
    return (use for use in decisions(graph) if use.slot == 1 and use.is_weight and is_op(use.node, "MatMul", "Gemm", "Conv"))


def _input_probe(node: ir.Node) -> Probe[MomentsStat]:
    return Moments(activation_channel_axis(node)).of(value_at(node, 0))


def _output_probe(node: ir.Node) -> Probe[MomentsStat]:
    return Moments(output_activation_axis(node)).of(node.outputs[0])


def _correct(graph: ir.Graph, layer: Use, mean: F64 | str, ctx: PassContext) -> bool:
    node, slot, quantizer = layer
    site, array = bias_site(node), const_array(node.inputs[slot])
    if site is None or quantizer.qparams is None or array is None:
        ctx.remarks.missed(str(node.name), "the layer has no constant bias to correct")
        return False
    if isinstance(mean, str):
        ctx.remarks.missed(str(node.name), mean)
        return False
    weight = array.astype(np.float32)
    error = quantizer.rounded(weight).astype(np.float64) - weight
    shift = mean_output(node, error, mean) if mean.ndim == 1 else None
    if shift is None:
        ctx.remarks.missed(str(node.name), "its input channels do not match the measured means")
        return False
    shift_bias(graph, site, -shift)
    ctx.remarks.applied(str(node.name), "bias corrected", largest_shift=float(np.abs(shift).max()))
    return True


@dataclass
class _Sequence:
    """Layer-by-layer correction of `model`, measured on a twin whose decisions are real Q/DQ nodes."""

    model: Model
    ctx: PassContext
    twin: Model = field(init=False)
    twins: dict[str | None, ir.Node] = field(init=False)

    def correct(self, layers: list[Use]) -> Generator[Needs, Mapping[Probe[Any], Stat], bool]:
        """All layers in order of depth; those of one depth do not feed each other and share a sweep."""
        if not layers:
            self.ctx.remarks.missed("", "no layer with a constant weight is quantized")
            return False
        self.twin = _quantized(self.model, self.ctx)
        self.twins = {n.name: n for n in self.twin.graph}
        depths = _depths(self.model.graph, {node for node, _, _ in layers})
        ordered = sorted((node for node, _, _ in layers), key=depths.__getitem__)
        done = False
        for _, level in groupby(ordered, key=depths.__getitem__):
            done = (yield from self._level(list(level))) or done
        return done

    def _level(self, nodes: list[ir.Node]) -> Generator[Needs, Mapping[Probe[Any], Stat], bool]:
        sites = {node: bias_site(node) for node in nodes}
        fit = [(node, site) for node, site in sites.items() if site is not None]
        for node in (node for node, site in sites.items() if site is None):
            self.ctx.remarks.missed(str(node.name), "the layer has no constant bias to correct")
        if not fit:
            return False
        measured = Told((yield Needs(self.twin, tuple(self._twin_probe(node) for node, _ in fit), BiasCorrection.name)))
        for node, site in fit:
            shift = self.ctx.told[_output_probe(node)].mean - measured[self._twin_probe(node)].mean
            shift_bias(self.model.graph, site, shift)
            shift_bias(self.twin.graph, (self.twins[site[0].name], site[1]), shift)
            self.ctx.remarks.applied(str(node.name), "bias corrected in order", largest_shift=float(np.abs(shift).max()))
        return True

    def _twin_probe(self, node: ir.Node) -> Probe[MomentsStat]:
        return Moments(output_activation_axis(node)).of(self.twins[node.name].outputs[0])


def _quantized(model: Model, ctx: PassContext) -> Model:
    twin = model.clone()
    for uses in grouped(twin.graph, ctx.target.one_quantizer):
        materialise(twin.graph, uses, ctx.target.body(ctx.scheme))
    clear_decisions(twin.graph)
    return twin


def _depths(graph: ir.Graph, layers: set[ir.Node]) -> dict[ir.Node, int]:
    """How many layers stand in front of each node on its longest path."""
    behind: dict[ir.Value, int] = {}
    depths: dict[ir.Node, int] = {}
    for node in graph:
        depths[node] = max((behind.get(v, 0) for v in node.inputs if v is not None), default=0)
        behind |= dict.fromkeys(node.outputs, depths[node] + (node in layers))
    return depths
