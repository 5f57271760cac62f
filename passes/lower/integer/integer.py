"""integer: the annotated model as standard integer operators only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from qcompile.decide.decisions import clear_decisions
from qcompile.ir.edit import erase_dead, sort
from qcompile.ir.model import Model
from qcompile.passes.lower.integer import divide as divides
from qcompile.passes.lower.integer import elementwise, linear
from qcompile.passes.lower.integer import lookup as lookups
from qcompile.passes.lower.integer import move as moves
from qcompile.passes.lower.integer import norm as norms
from qcompile.passes.lower.integer import softmax as softmaxes
from qcompile.passes.lower.integer.boundary import dequantize_outputs, quantize_inputs
from qcompile.passes.lower.integer.context import Scene
from qcompile.passes.lower.integer.cost import note_cost
from qcompile.passes.lower.integer.emit import Emitter, Fixed
from qcompile.passes.lower.integer.fused import ROUNDING, fused
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult, Stage
from qcompile.target.integer.plan import Step, is_float, plan

_IR_VERSION = 10
_LOWER: dict[str, Callable[[Scene, Step], Fixed]] = {
    "linear": linear.linear, "product": linear.product, "add": elementwise.add, "offset": elementwise.offset,
    "scale": elementwise.scale, "multiply": elementwise.multiply, "clamp": elementwise.clamp, "table": elementwise.table,
    "from-int": elementwise.from_int, "where": elementwise.where, "extreme": elementwise.extreme,
    "move": moves.move, "concat": moves.concat,
    "maxpool": moves.max_pool, "avgpool": moves.average_pool, "sum": moves.reduce_sum, "norm": norms.norm,
    "lookup": lookups.lookup, "softmax": softmaxes.softmax, "root": divides.root, "divide": divides.divide,
}  # fmt: skip


@dataclass(frozen=True)
class Integer(Pass):
    """Replace float arithmetic by integers: int8 products, int32 sums, dyadic rescaling by m / 2^e in int64.

    before: Relu(Conv(x, W, b)) with decisions on x, W and the output
    after:  DQ(clip(floor((ConvInteger(Q(x), W_q, z) + b_q) m + 2^(e-1)) / 2^e) + z')
    Between the first QuantizeLinear and the last DequantizeLinear no tensor is float.  One rounding, half up, for each stored
    tensor; residual adds sum on one exponent.  GELU and its kind are 256-entry tables, sines of a time step
    tables of their own; softmax is 2^x by table and shift, LayerNorm, RMSNorm and GroupNorm take an exact integer square root.
    (HAWQ-V3, arXiv:2011.10680; I-BERT, arXiv:2101.01321.)
    Profile ort-fused writes a layer whose readers all want the same int8 codes as QLinearConv or QLinearMatMul, which ONNX
    Runtime rescales in float32 and rounds half to even; all other layers keep the strict form.
    Refuses the model, naming each node and the reason, if one operator has no integer form.
    """

    name = "integer"
    kind = Kind.LOWER
    needs = Stage.FITTED
    reaches = Stage.LOWERED
    profile: Annotated[
        Literal["strict", "ort-fused"], "no float at all, or QLinearConv and QLinearMatMul with float scales inside"
    ] = "strict"

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Raises ModelError: an operator has no integer form, or a sum could overflow."""
        if self.name not in ctx.target.lowering(ctx.scheme):
            ctx.remarks.missed("", f"target {ctx.target.name} computes with Q/DQ around float operators; use --target integer")
            return PassResult(False)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model.ir)
        found = plan(model.graph)
        steps = (s.node for s in found.steps if s.family not in ("keep", "border"))
        found.require((node, reason) for node in steps if (reason := ctx.selection.excluded(node)))
        note_cost(found, ctx)
        scene = Scene(Emitter(model.graph, ctx), found)
        quantize_inputs(scene)
        for step in found.steps:
            _lower(scene, step, self.profile)
        dequantize_outputs(scene)
        _tidy(model)
        rounding = "half_up" if self.profile == "strict" else ROUNDING
        model.metadata.update({"qcompile.rounding": rounding, "qcompile.integer": self.profile})
        ctx.remarks.note("", "integer form complete", nodes=len(model.graph))
        return PassResult(True)


def _lower(scene: Scene, step: Step, profile: str) -> None:
    em = scene.em
    em.at = str(step.node.name)
    if step.family == "border":
        return
    if step.family == "keep":
        _keep(scene, step.node)
        return
    first = len(em.graph)
    made = _LOWER[step.family](scene, step)
    em.fixed[step.output] = fused(scene, step, made) if profile == "ort-fused" else made
    em.ctx.remarks.applied(em.at, f"{step.family} in integers", nodes=len(em.graph) - first)


def _keep(scene: Scene, node: ir.Node) -> None:
    """Integer nodes stay; a Shape reads the integers' shape."""
    for slot, value in enumerate(node.inputs):
        if value is not None and is_float(value) and value in scene.em.fixed:
            node.replace_input_with(slot, scene.em.fixed[value].value)


def _tidy(model: Model) -> None:
    clear_decisions(model.graph)
    erase_dead(model)
    sort(model.graph)
    model.ir.ir_version = max(_IR_VERSION, model.ir.ir_version or _IR_VERSION)
