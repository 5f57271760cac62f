"""The rewrite that fp16 and bf16 share."""

from __future__ import annotations

from collections.abc import Iterable

from qcompile.calib.observe import Probe, Told
from qcompile.ir.infer import infer_shapes
from qcompile.ir.model import Model
from qcompile.report import Remarks
from qcompile.rewrite.half.cast import convert
from qcompile.rewrite.half.mask import lowest
from qcompile.rewrite.half.measures import Measures
from qcompile.rewrite.half.rules import islands
from qcompile.rewrite.half.types import Narrow, carries_float


def wanted(model: Model, fmt: Narrow) -> Iterable[Probe]:
    """The extremes that the rules read: what could overflow, vanish as a divisor, or lose digits that matter; more of them while
    the weights may still change."""
    quantized = any(n.op_type == "QuantizeLinear" for n in model.graph)
    return Measures(model.graph, fmt, margin=1.0 if quantized else 0.5).probes()


def lower(model: Model, fmt: Narrow, told: Told, remarks: Remarks) -> bool:
    """Convert every node that is safe; cast where precisions meet.  Returns whether any was converted."""
    infer_shapes(model)
    scene = Measures(model.graph, fmt, told)
    kept = islands(scene)
    for node in [n for n in model.graph if n in kept]:
        remarks.missed(str(node.name), f"kept in float32: {kept[node]}")
    masks = [m for m in scene.masks.constants if lowest(m) < -fmt.safe]
    if masks:
        remarks.note("", f"{len(masks)} attention masks set to {-fmt.safe:.5g}, so that no sum of them is -inf")
    half = [node for node in model.graph if node not in kept and carries_float(node)]
    convert(model.graph, half, fmt, scene.masks.constants)
    remarks.applied("", f"{len(half)} nodes in {fmt.title}, {len(kept)} kept in float32")
    return bool(half)
