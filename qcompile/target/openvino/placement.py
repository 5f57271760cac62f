"""Where OpenVINO's CPU plugin wants Q/DQ (measured on 2026.4 with `tools/bench_openvino.py` and `get_runtime_model()`).

Inputs of layers in uint8 with a zero point (0 behind a ReLU), weights in int8 per channel; both inputs of a residual add of
convolutions, so that it reads and writes codes; pooling on codes.  In attention queries, keys and values are int8 without a
zero point and probabilities uint8, else the products are computed in float.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qcompile.decide.placement import Placement
from qcompile.ir.model import Model
from qcompile.ir.notes import kept_float
from qcompile.ir.ops import is_compute, is_const, is_op, weight_slot
from qcompile.quant.qtype import INT8
from qcompile.quant.spec import QuantSpec
from qcompile.structure.scores import Scores, find_scores, find_values
from qcompile.target.sensitive import sensitive
from qcompile.target.specs import activation_spec, unfit_for_cpu, weight_spec
from qcompile.target.target import Request

_POOLS = ("AveragePool", "GlobalAveragePool", "MaxPool")
_IN_BETWEEN = ("Add", "BatchNormalization", "Clip", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul", "PRelu", "Relu", "Sigmoid")
_MOST_STEPS = 16
_SIGNED = QuantSpec(INT8)


@dataclass
class _State:
    """One placement: `spec` is that of activations."""

    request: Request
    out: Placement
    spec: QuantSpec
    kept: dict[ir.Node, str]


def place(model: Model, request: Request) -> Placement:
    """Sites for the CPU plugin, in node order."""
    state = _State(request, Placement(), activation_spec(request), sensitive(model.graph))
    for node in model.graph:
        if is_compute(node) and (slot := weight_slot(node)) is not None:
            _layer(state, node, slot)
        elif is_op(node, "Softmax"):
            _attention(state, node)
        elif is_op(node, "Add"):
            _residual(state, node)
        elif is_op(node, *_POOLS) and len(node.outputs) == 1 and _from_convolution(node.inputs[0]):
            _quantize(state, node, 0)
    return state.out


def _layer(state: _State, node: ir.Node, slot: int) -> None:
    selection = state.request.selection
    reason = selection.excluded(node) or kept_float(node) or unfit_for_cpu(node, slot, "deconvolutions stay in float")
    if not reason and node in state.kept and selection.forced(node) is None:
        reason = f"{state.kept[node]} (--quantize {node.name})"
    if reason:
        state.out.miss(node, reason)
        return
    _quantize(state, node, 1 - slot if is_op(node, "MatMul", "Gemm") else 0)
    state.out.add(node, slot, weight_spec(node, slot, state.request.scheme))


def _quantize(state: _State, node: ir.Node, slot: int) -> None:
    """Q in front of `slot`; behind a pool that picks codes the tensor in front of the pool is the one."""
    value = node.inputs[slot]
    producer = None if value is None else value.producer()
    if producer is not None and is_op(producer, "MaxPool") and _from_convolution(producer.inputs[0]):
        return
    state.out.add(node, slot, state.spec)


def _attention(state: _State, softmax: ir.Node) -> None:
    """Queries, keys, probabilities and values, or none."""
    scores, values = find_scores(softmax), find_values(softmax)
    if not isinstance(scores, Scores) or values is None:
        return
    products, choice = (scores.matmul, values.matmul), state.request.choices.attention
    reason = state.request.selection.any_excluded(products)
    if not reason and choice == "none" and not any(state.request.selection.forced(n) for n in products):
        reason = "attention left in float on request"
    if reason:
        for node in products:
            state.out.miss(node, reason)
        return
    state.out.add(scores.matmul, 0, _SIGNED)
    state.out.add(scores.matmul, 1, _SIGNED)
    state.out.add(values.matmul, values.slot, _SIGNED)
    state.out.add(values.matmul, 1 - values.slot, state.spec)


def _residual(state: _State, add: ir.Node) -> None:
    """Both inputs of a sum of convolutions: the plugin adds codes, inside the second convolution where it can."""
    if any(is_const(v) for v in add.inputs) or not all(_from_convolution(v) for v in add.inputs):
        return
    if reason := state.request.selection.excluded(add):
        state.out.miss(add, reason)
        return
    _quantize(state, add, 0)
    _quantize(state, add, 1)


def _from_convolution(value: ir.Value | None) -> bool:
    """Whether a convolution makes the tensor, with pointwise operators, sums and pooling behind it."""
    for _ in range(_MOST_STEPS):
        node = None if value is None else value.producer()
        if node is None or is_op(node, "Conv"):
            return node is not None
        if not is_op(node, *_IN_BETWEEN, *_POOLS):
            return False
        value = next((v for v in node.inputs if v is not None and not is_const(v)), None)
    return False
