"""The rewrite that fp16 and bf16 share."""

from __future__ import annotations

from collections.abc import Iterable

from onnx_ir.passes.common import ShapeInferencePass

from qcompile.calib.observers import Probe
from qcompile.ir.model import Model
from qcompile.passes._half import Narrow, carries_float
from qcompile.passes._half_cast import convert
from qcompile.passes._half_mask import lowest
from qcompile.passes._half_rules import islands
from qcompile.passes._half_scene import Scene
from qcompile.pipeline.base import PassContext, PassResult


def wanted(model: Model, fmt: Narrow) -> Iterable[Probe]:
    """What the rules will read; more of it while the weights may still change."""
    quantized = any(n.op_type == "QuantizeLinear" for n in model.graph)
    return Scene(model.graph, fmt, margin=1.0 if quantized else 0.5).probes()


def lower(model: Model, ctx: PassContext, fmt: Narrow) -> PassResult:
    """Convert every node that is safe; cast where precisions meet."""
    ShapeInferencePass()(model.ir)
    scene = Scene(model.graph, fmt, ctx.stats)
    kept = islands(scene)
    for node in [n for n in model.graph if n in kept]:
        ctx.missed(str(node.name), f"kept in float32: {kept[node]}")
    masks = [m for m in scene.masks.constants if lowest(m) < -fmt.safe]
    if masks:
        ctx.note("", f"{len(masks)} attention masks set to {-fmt.safe:.5g}, so that no sum of them is -inf")
    half = [node for node in model.graph if node not in kept and carries_float(node)]
    convert(model.graph, half, fmt, scene.masks.constants)
    ctx.applied("", f"{len(half)} nodes in {fmt.title}, {len(kept)} kept in float32")
    return PassResult(bool(half))
