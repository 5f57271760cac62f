"""Where the integer-only form needs codes: every tensor between the first Q and the last DQ has a format.

8 bit, with a zero point, in front of products, convolutions, tables and pooling; 16 bit on residual streams and into norms
(HAWQ-V3 keeps residuals at 16 bit too); accumulators stay at the product of their scales until a reader wants codes.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompile.decide.placement import Placement
from qcompile.ir.model import Model
from qcompile.ir.ops import weight_slot
from qcompile.quant.qtype import INT16
from qcompile.quant.spec import QuantSpec, Scheme
from qcompile.target.integer.plan import Plan, Step, entrances, entry, is_float, leaves, must_store, own_store, plan, settled
from qcompile.target.specs import weight_spec
from qcompile.target.target import Request

WIDE = QuantSpec(INT16)
_COUNTS = QuantSpec(INT16, symmetric=False)
_NARROW_INPUTS = {"linear": (0,), "product": (0, 1), "maxpool": (0,), "avgpool": (0,)}


def place(model: Model, request: Request) -> Placement:
    """Sites for every step.

    Raises:
        ModelError: something has no integer form; nothing is calibrated for nothing.
    """
    out, found = Placement(), plan(model.graph)
    found.require()
    for value in entrances(model.graph):
        _graph_input(out, found, value)
    for step in found.steps:
        _inputs(out, step, request.selection.scheme_of(step.node, request.scheme))
        for value in step.node.outputs:
            _output(out, found, step, value)
    return out


def _graph_input(out: Placement, found: Plan, value: ir.Value) -> None:
    """A float input whose readers name no format gets 16 bit, noted at the first reader that takes any."""
    if not is_float(value) or not own_store(found, value):
        return
    reader = next((leaf for leaf in leaves(found, value) if leaf.want == "raw" and leaf.node is not None), None)
    if reader is not None and reader.node is not None:
        out.add(reader.node, reader.slot, WIDE, value)


def _inputs(out: Placement, step: Step, scheme: Scheme) -> None:
    assert scheme.activation is not None
    narrow = QuantSpec(scheme.activation, symmetric=False)
    for slot in _NARROW_INPUTS.get(step.family, ()):
        out.add(step.node, slot, narrow)
    if step.family == "linear":
        slot = weight_slot(step.node)
        assert slot is not None
        out.add(step.node, slot, weight_spec(step.node, slot, scheme))
    if step.family in ("table", "norm"):
        reader, slot = entry(step)
        out.add(reader, slot, narrow if step.family == "table" else WIDE)


def _output(out: Placement, found: Plan, step: Step, value: ir.Value) -> None:
    if step.family == "from-int":
        out.add(step.node, ~0, _COUNTS)
    if step.family in ("keep", "move", "from-int", "border") or value.producer() is None or _merged(step):
        return
    last = settled(value)
    maker, index = last.producer(), last.index()
    if must_store(found, step, last) and own_store(found, last):
        assert maker is not None and index is not None
        out.add(maker, ~index, WIDE)


def _merged(step: Step) -> bool:
    """Whether the step is a clamp that alone reads its input, so that it becomes the limits of that tensor's codes."""
    return step.family == "clamp" and step.source is not None and settled(step.source) is not step.source
