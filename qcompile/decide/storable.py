"""Scales that the type of what is not quantized can hold; sites whose scale it cannot stay float."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompile.decide.decisions import Use, quantizers, undecide
from qcompile.decide.quantizer import PREFIX, Quantizer
from qcompile.quant.blockformats import block_format
from qcompile.report import Remarks

_LIMITS = {  # largest number, smallest with a useful precision (float16 keeps at most 4 bits of smaller ones)
    "float16": (65504.0, 2.0**-20),
    "bfloat16": (float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), 2.0**-126),
}


def refuse_unstorable(graph: ir.Graph, body: str, remarks: Remarks) -> None:
    """Drop all decisions of the nodes that a quantizer with a scale beyond `body` would serve, with a remark each.

    `body` is the type of what is not quantized: float32, float16 or bfloat16.
    """
    reasons: dict[ir.Node, str] = {}
    for uses in quantizers(graph):
        if (reason := _unstorable(uses, body)) is not None:
            reasons |= {use.node: reason for use in uses if use.node not in reasons}
    for node, reason in reasons.items():
        for key in [k for k in node.meta if k.startswith(PREFIX)]:
            undecide(node, int(key.removeprefix(PREFIX)))
        remarks.missed(str(node.name), reason)


def _unstorable(uses: list[Use], body: str) -> str | None:
    quantizer = uses[0].quantizer
    if body not in _LIMITS or quantizer.qparams is None or not holds_float_scales(quantizer):
        return None
    largest, useful = _LIMITS[body]
    scale, what = quantizer.known.scale, f"the scale of {uses[0].value.name}"
    if scale.max(initial=0.0) > largest:
        return f"{what} is {scale.max():.3g}, beyond {body}: kept in float"
    if scale.size and np.median(scale) < useful:  # a few nearly dead channels may be rounded up
        return f"{what} is {np.median(scale):.3g} and vanishes in {body}: kept in float"
    return None


def holds_float_scales(quantizer: Quantizer) -> bool:
    """Whether the scales are numbers of the type of what is not quantized, to which they are rounded."""
    return block_format(quantizer.spec) is None and quantizer.spec.qtype.family in ("int", "float")
