"""Where ONNX Runtime's CPU provider wants Q/DQ."""

from __future__ import annotations

from qcompile.ir.model import Model
from qcompile.passes import _placement_trt
from qcompile.passes._placement import Placement
from qcompile.pipeline.base import PassContext


def place(model: Model, ctx: PassContext, attention: str) -> Placement:
    """Placeholder."""
    return _placement_trt.place(model, ctx, attention)
