"""Where ONNX Runtime's CPU kernels want Q/DQ (measured on 1.31.1 with `tools/bench_ort.py`).

Convolutions fuse to QLinearConv only with a Q on input and output, Relu absorbed, and behind other activations the output's
range is the one that is best once the activation has been applied; residual adds of a conv net to QLinearAdd;
MatMul with a weight to MatMulIntegerToFloat with a Q on its input alone.  Activations are uint8, weights int8 per channel.
The products of attention, norms, softmax, GELU, and the heads stay in float: quantizing them is slower and costs accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from qcompile.decide.placement import Placement
from qcompile.ir.model import Model
from qcompile.ir.notes import kept_float
from qcompile.ir.ops import const_array, const_value, ints_attr, is_compute, is_data_movement, is_op, static_shape, weight_slot
from qcompile.quant.spec import QuantSpec
from qcompile.structure.response import response
from qcompile.target.sensitive import HEAD, sensitive
from qcompile.target.specs import activation_spec, unfit_for_cpu, weight_spec
from qcompile.target.target import Request

_GEMM_SHARE = 0.5
_HEAD_SHARE = 0.125  # of all weights: a head that is more of the work stays quantized


@dataclass
class _Ort:
    """The state of one placement: `conv_values` are the tensors that a quantized convolution or add makes."""

    request: Request
    out: Placement
    spec: QuantSpec
    kept: dict[ir.Node, str]
    conv_values: set[str] = field(default_factory=set[str])


def place(model: Model, request: Request) -> Placement:
    """Sites for the CPU provider, in node order."""
    assert request.scheme.activation is not None
    kept = _kept(model.graph) if request.native else dict[ir.Node, str]()
    state = _Ort(request, Placement(), activation_spec(request), kept)
    with_gemms = _gemm_share(model.graph) > _GEMM_SHARE
    for node in model.graph:
        if is_op(node, "Add"):
            _residual(state, node)
        elif is_op(node, "MaxPool"):
            _pool(state, node)
        elif is_compute(node):
            _compute(state, node, with_gemms)
    return state.out


def _compute(state: _Ort, node: ir.Node, with_gemms: bool) -> None:
    slot = weight_slot(node)
    if slot is None:
        _product(state, node)
        return
    reason = (
        state.request.selection.excluded(node)
        or kept_float(node)
        or unfit_for_cpu(node, slot, "the CPU provider has no integer deconvolution")
    )
    if not reason and state.request.selection.forced(node) is None:
        reason = state.kept.get(node) or _refusal(node, with_gemms)
    if reason:
        state.out.miss(node, reason)
        return
    state.out.add(node, 0, state.spec)
    state.out.add(node, slot, weight_spec(node, slot, state.request.scheme))
    if is_op(node, "Conv"):
        _output(state, node)


def _product(state: _Ort, node: ir.Node) -> None:
    reason = state.request.selection.excluded(node)
    if not reason and state.request.selection.forced(node) is None:
        reason = "a product of two activations is faster in float on the CPU provider"
    if reason:
        state.out.miss(node, reason)
        return
    state.out.add(node, 0, state.spec)
    state.out.add(node, 1, state.spec)


def _refusal(node: ir.Node, with_gemms: bool) -> str | None:
    """Why the default leaves the layer in float; --quantize overrides."""
    if is_op(node, "Conv") and _skips(node) and _to_tokens(node.outputs[0]):
        return "a patch embedding: an integer kernel would need its output quantized, which costs accuracy and gains nothing"
    if _is_flat(node) and (not with_gemms or _is_head(node)):
        return "a small dense layer or head is as fast in float"
    if is_op(node, "Gemm") and len(node.inputs) > 2 and node.inputs[2] is not None and not with_gemms:
        return "its float bias keeps the Gemm in float"
    return None


def _is_flat(node: ir.Node) -> bool:
    """Whether the layer reads a matrix, one row a sample."""
    data = node.inputs[0]
    return is_op(node, "Gemm") or (is_op(node, "MatMul") and data is not None and data.shape is not None and len(data.shape) < 3)


def _kept(graph: ir.Graph) -> dict[ir.Node, str]:
    """Sensitive layers; of the heads the convolutions, if they hold few of the weights."""
    found = sensitive(graph)
    heads = frozenset(n for n, reason in found.items() if reason == HEAD and is_op(n, "Conv"))
    sizes = {n: v.size for n in graph if (s := weight_slot(n)) is not None and (v := const_value(n.inputs[s])) is not None}
    few = sum(sizes.get(n, 0) for n in heads) <= _HEAD_SHARE * sum(sizes.values())
    return {n: reason for n, reason in found.items() if reason != HEAD or (few and n in heads)}


def _is_head(node: ir.Node) -> bool:
    value, steps = node.outputs[0], 0
    while steps < 4 and not value.is_graph_output():
        uses = list(value.uses())
        if len(uses) != 1 or is_compute(uses[0][0]):
            return False
        value, steps = uses[0][0].outputs[0], steps + 1
    return value.is_graph_output()


def _gemm_share(graph: ir.Graph) -> float:
    """The part of all weights that dense layers on matrices hold."""
    total = flat = 0
    for node in graph:
        slot = weight_slot(node) if is_compute(node) else None
        weight = const_value(node.inputs[slot]) if slot is not None else None
        if weight is not None:
            total += weight.size
            flat += weight.size if _is_flat(node) else 0
    return flat / total if total else 0.0


def _skips(conv: ir.Node) -> bool:
    """Whether the windows may be patches of a picture: not along one axis alone, and not overlapping at every position."""
    kernel = (static_shape(conv.inputs[1]) or ())[2:]
    long, strides = sum(k != 1 for k in kernel), ints_attr(conv, "strides") or (1,)
    return long == 0 or (long > 1 and max(strides) > 1)


def _to_tokens(value: ir.Value) -> bool:
    """Whether a convolution's output goes nowhere but into token layout."""
    uses = list(value.uses())
    moves = [n for n, _ in uses if not is_op(n, "Shape")]
    return bool(moves) and all(is_data_movement(n) and is_op(n, "Reshape", "Transpose", "Flatten", "Squeeze") for n in moves)


def _rectified(value: ir.Value) -> ir.Value:
    """Behind the Relu or Clip(0, .) that alone reads `value`: the Q absorbs it."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return value
    node = uses[0][0]
    if is_op(node, "Relu") or (is_op(node, "Clip") and _starts_at_zero(node)):
        return node.outputs[0]
    return value


def _starts_at_zero(clip: ir.Node) -> bool:
    low = const_array(clip.inputs[1]) if len(clip.inputs) > 1 else None
    return low is not None and float(low.reshape(-1)[0]) == 0.0


def _output(state: _Ort, node: ir.Node) -> None:
    """Q behind the layer and its Relu, read by everybody."""
    value = _rectified(node.outputs[0])
    if value.is_graph_output() and value is node.outputs[0]:
        return
    owner = value.producer()
    assert owner is not None
    state.out.add(owner, ~(value.index() or 0), state.spec, seen=response(value))
    state.conv_values.add(str(value.name))


def _residual(state: _Ort, node: ir.Node) -> None:
    """A residual add of a conv net: both operands come from quantized convolutions or adds."""
    names = [str(v.name) for v in node.inputs if v is not None]
    if len(names) != 2 or any(name not in state.conv_values for name in names) or state.request.selection.excluded(node):
        return
    state.out.add(node, 0, state.spec)
    state.out.add(node, 1, state.spec)
    _output(state, node)


def _pool(state: _Ort, node: ir.Node) -> None:
    """Pooling picks codes: its output keeps the scale of its input."""
    source = node.inputs[0]
    if source is None or str(source.name) not in state.conv_values or len(node.outputs) > 1:
        return
    state.out.add(node, 0, state.spec)
    state.out.add(node, ~0, state.spec, like=source)
    state.conv_values.add(str(node.outputs[0].name))
