"""bias-correct: take the mean error of rounded weights out of the bias."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observers import Moments, MomentsStat, Probe
from qcompile.ir.decisions import Decision, decisions, value_at
from qcompile.ir.edit import add_constant, set_constant
from qcompile.ir.model import Model
from qcompile.ir.ops import activation_channel_axis, const_array, int_attr, is_compute, is_op, output_channel_axis, weight_slot
from qcompile.pipeline.base import Fact, Kind, Pass, PassContext, PassResult
from qcompile.quant.affine import fake_quant


@dataclass(frozen=True)
class BiasCorrection(Pass):
    """Correct biases for the shift that weight rounding causes: c' = c - (Q(W) - W) E[x].

    (Nagel et al. 2019, arXiv:1906.04721, section 4.2, with E[x] measured on calibration data.)
    before: Conv(x, Q(W), c)    after: Conv(x, Q(W), c')
    The squared error of the layer falls by the square of its mean, so it never rises on the calibration data.
    Refuses layers without a bias that a constant could be added to.
    """

    name = "bias-correct"
    kind = Kind.FIT
    requires = frozenset({Fact.DECIDED, Fact.FITTED})

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """Per-channel means of the inputs of quantized layers (of all layers, where nothing is decided yet)."""
        if any(True for _ in decisions(model.graph)):
            return dict.fromkeys(_probe(node) for node, _, _ in _layers(model.graph))
        return dict.fromkeys(_probe(node) for node in model.graph if is_compute(node) and weight_slot(node) == 1)

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Correct every layer that has a bias."""
        changed = [_correct(model.graph, node, slot, d, ctx) for node, slot, d in list(_layers(model.graph))]
        return PassResult(any(changed))


def _layers(graph: ir.Graph) -> Iterator[tuple[ir.Node, int, Decision]]:
    for node, slot, d in decisions(graph):
        right = slot == 1 and is_op(node, "MatMul", "Gemm", "Conv")
        if right and value_at(node, slot).const_value is not None:
            yield node, slot, d


def _probe(node: ir.Node) -> Probe:
    return Probe(str(value_at(node, 0).name), Moments(activation_channel_axis(node)))


def _correct(graph: ir.Graph, node: ir.Node, slot: int, d: Decision, ctx: PassContext) -> bool:
    site = bias_site(node)
    stat = ctx.stats.get(_probe(node))
    if site is None or d.qparams is None or not isinstance(stat, MomentsStat) or stat.mean.ndim != 1:
        ctx.missed(str(node.name), "the layer has no constant bias to correct")
        return False
    array = const_array(node.inputs[slot])
    assert array is not None
    weight = array.astype(np.float32)
    error = fake_quant(weight, d.qparams, d.spec.qtype, d.spec.granularity).astype(np.float64) - weight
    shift = mean_output(node, error, stat.mean)
    if shift is None:
        ctx.missed(str(node.name), "its input channels do not match the measured means")
        return False
    owner, bias_slot = site
    old = const_array(owner.inputs[bias_slot]) if bias_slot < len(owner.inputs) else None
    base = np.zeros(shift.shape) if old is None else old.astype(np.float64)
    _set(graph, owner, bias_slot, base - shift.reshape(base.shape if base.size == shift.size else shift.shape))
    ctx.applied(str(node.name), "bias corrected", largest_shift=float(np.abs(shift).max()))
    return True


def mean_output(node: ir.Node, weight: NDArray[np.float64], mean: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """E[output] of a linear layer without bias: `weight` as stored, `mean` [C_in]; None if they do not fit."""
    if is_op(node, "Conv"):
        per_input = weight.reshape(weight.shape[0], weight.shape[1], -1).sum(2)
        groups = int_attr(node, "group", 1)
        if groups * weight.shape[1] != mean.size:
            return None
        means = mean.reshape(groups, weight.shape[1]).repeat(weight.shape[0] // groups, axis=0)
        return (per_input * means).sum(1)
    k = weight if output_channel_axis(node) == 1 else weight.T
    return mean @ k if k.shape[0] == mean.size else None


def bias_site(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Where the constant bias of a layer is read: its own slot (made if missing), or the Add behind a MatMul."""
    if is_op(node, "Conv", "Gemm"):
        present = len(node.inputs) > 2 and node.inputs[2] is not None
        return None if present and const_array(node.inputs[2]) is None else (node, 2)
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or not is_op(uses[0][0], "Add"):
        return None
    add, slot = uses[0]
    bias = const_array(add.inputs[1 - slot])
    return (add, 1 - slot) if bias is not None and bias.size == bias.shape[-1] > 1 else None


def _set(graph: ir.Graph, owner: ir.Node, slot: int, bias: NDArray[np.float64]) -> None:
    if slot < len(owner.inputs) and owner.inputs[slot] is not None:
        set_constant(owner, slot, bias)
        return
    dtype = owner.inputs[1].dtype if owner.inputs[1] is not None else None
    owner.resize_inputs(slot + 1)
    array = bias.astype(dtype.numpy() if dtype is not None else np.float32)
    owner.replace_input_with(slot, add_constant(graph, f"{owner.name}_bias", array, dtype))
