"""Which operators are taken apart, by whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from qcompile.ir.infer import infer_shapes
from qcompile.ir.model import Model
from qcompile.passes.forms.canonicalize.operators.activations import fast_gelu, gelu, quick_gelu
from qcompile.passes.forms.canonicalize.operators.einsum import einsum
from qcompile.passes.forms.canonicalize.operators.grouped import grouped
from qcompile.passes.forms.canonicalize.operators.norms import (
    embed_layer_norm,
    layer_norm,
    rms_norm,
    skip_layer_norm,
    skip_rms_norm,
)
from qcompile.passes.forms.canonicalize.operators.own_attention import multi_head, own_attention
from qcompile.passes.forms.canonicalize.operators.products import conv, gemm, matmul
from qcompile.passes.forms.canonicalize.operators.rotary import own_rotary, rotary
from qcompile.passes.forms.canonicalize.operators.standard import attention
from qcompile.passes.forms.canonicalize.operators.writer import Kept, Writer, Written
from qcompile.pipeline.base import PassContext

Rewriter = Callable[[Writer], None]
"""Writes an operator in plain ones.

Raises:
    Kept: it cannot.
"""

_OWN = "com.microsoft"
OPERATORS: Mapping[tuple[str, str], Rewriter] = {
    ("", "Attention"): attention,
    ("", "Einsum"): einsum,
    ("", "RotaryEmbedding"): rotary,
    ("", "SimplifiedLayerNormalization"): rms_norm,
    (_OWN, "Attention"): own_attention,
    (_OWN, "BiasGelu"): gelu,
    (_OWN, "EmbedLayerNormalization"): embed_layer_norm,
    (_OWN, "FastGelu"): fast_gelu,
    (_OWN, "FusedConv"): conv,
    (_OWN, "FusedGemm"): gemm,
    (_OWN, "FusedMatMul"): matmul,
    (_OWN, "Gelu"): gelu,
    (_OWN, "GroupQueryAttention"): grouped,
    (_OWN, "MultiHeadAttention"): multi_head,
    (_OWN, "QuickGelu"): quick_gelu,
    (_OWN, "RotaryEmbedding"): own_rotary,
    (_OWN, "SkipLayerNormalization"): skip_layer_norm,
    (_OWN, "SkipSimplifiedLayerNormalization"): skip_rms_norm,
}
"""(domain, operator) -> what it is made of."""
_BEFORE: Mapping[str, tuple[int, Rewriter]] = {"LayerNormalization": (17, layer_norm)}
"""Operators that ONNX Runtime's optimizer writes in front of the opset that brought them."""
_ASKS_FOR_WHOLE = frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention"})
_LOWEST = 11
"""The opset from which on all that is written here exists."""


def _rewriter(node: ir.Node, opset: int) -> Rewriter | None:
    since, early = _BEFORE.get(node.op_type, (0, None))
    return early if not node.domain and opset < since else OPERATORS.get((node.domain, node.op_type))


def take_apart(model: Model, ctx: PassContext) -> int:
    """Write the operators of the table in plain ones, in the main graph; returns how many.

    Those that need a rank which only shows behind another one wait for the next round.
    """
    written, count = Written(), 0
    waiting = [n for n in model.graph if _rewriter(n, model.opset) is not None and not _kept_whole(n, ctx)]
    while waiting:
        reasons = {node: reason for node in waiting if (reason := _apart(model, node, written, ctx)) is not None}
        if len(reasons) < len(waiting):
            infer_shapes(model)
        if len(reasons) in (0, len(waiting)):
            for node, reason in reasons.items():
                ctx.remarks.missed(str(node.name), f"{node.op_type} stays as it is: {reason}")
            count += len(waiting) - len(reasons)
            break
        count, waiting = count + len(waiting) - len(reasons), list(reasons)
    return count


def _kept_whole(node: ir.Node, ctx: PassContext) -> bool:
    """ONNX Runtime's own attention is faster in one piece, where nothing inside is quantized."""
    return node.domain == _OWN and node.op_type in _ASKS_FOR_WHOLE and ctx.target.whole_attention(ctx.scheme)


def _apart(model: Model, node: ir.Node, written: Written, ctx: PassContext) -> str | None:
    """Why `node` stays, None if it was written in plain operators."""
    name, op_type = str(node.name), node.op_type
    rewriter = _rewriter(node, model.opset)
    assert rewriter is not None
    if model.opset < _LOWEST:
        return f"opset {model.opset} is too old for its parts; export at opset {_LOWEST} or later"
    writer = Writer(model.graph, node, model.opset, written)
    try:
        rewriter(writer)
    except Kept as reason:
        return str(reason)
    ctx.remarks.applied(name, f"{op_type} written in plain operators{writer.assumes}")
    return None
