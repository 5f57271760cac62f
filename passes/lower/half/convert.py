"""The rewrite that fp16 and bf16 share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from onnx_ir.passes.common import ShapeInferencePass

from qcompile.calib.observe import Probe
from qcompile.ir.model import Model
from qcompile.passes.lower.half.cast import convert
from qcompile.passes.lower.half.mask import lowest
from qcompile.passes.lower.half.measures import Scene
from qcompile.passes.lower.half.rules import islands
from qcompile.passes.lower.half.types import Narrow, carries_float
from qcompile.pipeline.base import Fact, Kind, Pass, PassContext, PassResult
from qcompile.quant.spec import Scheme
from qcompile.target.target import Target


@dataclass(frozen=True)
class HalfLowering(Pass):
    """A pass that turns float32 tensors into `format`."""

    kind = Kind.LOWER
    requires = frozenset({Fact.CANONICAL})
    establishes = frozenset({Fact.HALF})
    format: ClassVar[Narrow]

    def required(self, target: Target, scheme: Scheme) -> frozenset[Fact]:
        """Quantizers come first: their scales are computed in float32, and stored in the type of the rest."""
        return self.requires | ({Fact.NORMS_FUSED} if scheme.weight is None else {Fact.QUANTIZED})

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """The extremes that the rules read: what could overflow, vanish as a divisor, or lose digits that matter."""
        return wanted(model, self.format)

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Convert every node that is safe; cast where precisions meet."""
        return lower(model, ctx, self.format)


def wanted(model: Model, fmt: Narrow) -> Iterable[Probe]:
    """What the rules will read; more of it while the weights may still change."""
    quantized = any(n.op_type == "QuantizeLinear" for n in model.graph)
    return Scene(model.graph, fmt, margin=1.0 if quantized else 0.5).probes()


def lower(model: Model, ctx: PassContext, fmt: Narrow) -> PassResult:
    """Convert every node that is safe; cast where precisions meet."""
    ShapeInferencePass()(model.ir)
    scene = Scene(model.graph, fmt, ctx.told)
    kept = islands(scene)
    for node in [n for n in model.graph if n in kept]:
        ctx.remarks.missed(str(node.name), f"kept in float32: {kept[node]}")
    masks = [m for m in scene.masks.constants if lowest(m) < -fmt.safe]
    if masks:
        ctx.remarks.note("", f"{len(masks)} attention masks set to {-fmt.safe:.5g}, so that no sum of them is -inf")
    half = [node for node in model.graph if node not in kept and carries_float(node)]
    convert(model.graph, half, fmt, scene.masks.constants)
    ctx.remarks.applied("", f"{len(half)} nodes in {fmt.title}, {len(kept)} kept in float32")
    return PassResult(bool(half))
