"""fold-bn: BatchNormalization into the convolution or linear layer before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.edit import add_constant, erase_dead, replace_value, set_constant
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array, is_op, output_channel_axis
from qcompile.pipeline.base import Fact, Kind, Pass, PassContext, PassResult


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNormalization into the Conv, ConvTranspose or Gemm that feeds it.

    before: Conv(x, W, c) -> BatchNormalization(gamma, beta, mu, v)
    after:  Conv(x, W * f, (c - mu) * f + beta),  f = gamma / sqrt(v + eps)   (Jacob et al. 2018, section 3.2)
    Refuses a convolution whose output has another reader, and training-mode normalization.
    """

    name = "fold-bn"
    kind = Kind.EQUIVALENT
    requires = frozenset({Fact.CANONICAL})
    establishes = frozenset({Fact.BN_FOLDED})

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Fold every legal site; see the class."""
        folded = [_fold(model.graph, node, ctx) for node in list(model.graph) if is_op(node, "BatchNormalization")]
        erase_dead(model)
        changed = frozenset(name for name in folded if name)
        return PassResult(bool(changed), changed=changed)


def _fold(graph: ir.Graph, bn: ir.Node, ctx: PassContext) -> str:
    """Returns the name of the convolution output that changed its values, or an empty string."""
    conv = bn.inputs[0].producer() if bn.inputs[0] is not None else None
    reason = _refusal(bn, conv)
    if reason or conv is None:
        ctx.missed(str(bn.name), reason or "nothing to fold into")
        return ""
    gamma, beta, mean, var = (_wide(bn.inputs[i]) for i in range(1, 5))
    factor = gamma / np.sqrt(var + (bn.attributes["epsilon"].as_float() if "epsilon" in bn.attributes else 1e-5))
    weight = _wide(conv.inputs[1])
    axis = output_channel_axis(conv)
    set_constant(conv, 1, weight * factor.reshape([-1 if i == axis else 1 for i in range(weight.ndim)]))
    bias = _wide(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else np.zeros_like(mean)
    _set_bias(graph, conv, (bias - mean) * factor + beta)
    name = str(conv.outputs[0].name)
    replace_value(graph, bn.outputs[0], conv.outputs[0])
    ctx.applied(str(bn.name), f"folded into {conv.name}")
    return name


def _refusal(bn: ir.Node, conv: ir.Node | None) -> str | None:
    if conv is None or not is_op(conv, "Conv", "ConvTranspose", "Gemm") or const_array(conv.inputs[1]) is None:
        return "the layer before it is no Conv, ConvTranspose or Gemm with a constant weight"
    if len(conv.outputs[0].uses()) != 1 or conv.outputs[0].is_graph_output():
        return f"the output of {conv.name} has another reader"
    if len([o for o in bn.outputs if o.uses()]) > 1 or (
        "training_mode" in bn.attributes and bn.attributes["training_mode"].as_int()
    ):
        return "it is in training mode"
    if any(const_array(v) is None for v in bn.inputs[1:5]) or (
        len(conv.inputs) > 2 and conv.inputs[2] is not None and const_array(conv.inputs[2]) is None
    ):
        return "its parameters are not constant"
    if is_op(conv, "ConvTranspose") and "group" in conv.attributes and conv.attributes["group"].as_int() > 1:
        return "grouped ConvTranspose"
    return None


def _wide(value: ir.Value | None) -> NDArray[np.float64]:
    array = const_array(value)
    assert array is not None
    return array.astype(np.float64)


def _set_bias(graph: ir.Graph, conv: ir.Node, bias: NDArray[Any]) -> None:
    if len(conv.inputs) > 2 and conv.inputs[2] is not None:
        set_constant(conv, 2, bias)
        return
    weight = conv.inputs[1]
    assert weight is not None and weight.dtype is not None
    conv.resize_inputs(3)
    conv.replace_input_with(2, add_constant(graph, f"{conv.name}_bias", bias.astype(weight.dtype.numpy()), weight.dtype))
