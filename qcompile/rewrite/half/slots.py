"""Which float32 tensors of an operator may become narrow: what its schema says, and what engines and sense say beyond it."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from qcompile.ir.ops import is_op
from qcompile.ir.schemas import Signature, is_tensor, signature
from qcompile.rewrite.half.types import Narrow, is_float

_TYPED_BY = frozenset({"to", "dtype", "output_dtype", "value"})
"""Attributes that say which type an output has that no input has; `stash_type` means float32 and stays."""
_REGION = 1  # of Resize: its coordinates lose pixels in 16 bits
_PLUGINS = "trt"
_BFLOAT16_OPSET = 22


def takes(node: ir.Node, slot: int, fmt: Narrow, opsets: Mapping[str, int]) -> bool:
    """Whether input `slot` (>= 0) or output `~slot` of `node`, a float32 tensor, may be one of `fmt`."""
    if node.domain == _PLUGINS:
        return True
    known = signature(node, _opsets(fmt, opsets))
    if known is None or not known.takes(slot, fmt.dtype) or (is_op(node, "Resize") and slot == _REGION):
        return False
    return slot >= 0 or _follows(known, slot)


def _opsets(fmt: Narrow, opsets: Mapping[str, int]) -> Mapping[str, int]:
    """Those whose schemas are asked.  ONNX lets convolutions and pools take bfloat16 from opset 22 on; TensorRT always did."""
    return {**opsets, "": max(opsets.get("", 1), _BFLOAT16_OPSET)} if fmt.dtype == ir.DataType.BFLOAT16 else opsets


def _follows(known: Signature, slot: int) -> bool:
    """Whether an output's type is that of an input, or one that an attribute says."""
    return known.variable(slot) in known.inputs or bool(known.attributes & _TYPED_BY)


def refusal(node: ir.Node, fmt: Narrow, opsets: Mapping[str, int]) -> str | None:
    """Why `node` takes and makes nothing in `fmt`, or None."""
    values = [(i, v) for i, v in enumerate(node.inputs)] + [(~i, v) for i, v in enumerate(node.outputs)]
    if any(v is not None and not is_tensor(v) for _, v in values):
        return "it carries a sequence or an optional value"
    if node.domain != _PLUGINS and signature(node, opsets) is None:
        return f"{node.domain or 'unknown'} operators are not known to take {fmt.title}"
    if not any(is_float(v) and takes(node, slot, fmt, opsets) for slot, v in values):
        return f"{node.op_type} of opset {opsets.get(node.domain, 1)} is not computed in {fmt.title}"
    return None
