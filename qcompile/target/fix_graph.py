"""Fixes of placement, names and opsets."""

from __future__ import annotations

import onnx
from onnx import NodeProto, version_converter

from qcompile.target.attention import attention_blocks
from qcompile.target.findings import Context, Site
from qcompile.target.fix_edits import pair_of, replace_uses, unquantize
from qcompile.target.rules_common import duplicate_quantizers, needed_opset
from qcompile.target.tensorrt.checks import deconvolution, one_operand_only, quantized_operands, scores_dequantizer
from qcompile.target.tensorrt.shapes import large_fp8_kernel
from qcompile.target.view import name_nodes

CONVERTIBLE_BYTES = 1_500_000_000


def unique_names(c: Context) -> None:
    """Name every node: its operator and number where it has none, a number behind it where the name is taken."""
    name_nodes(c.view.model)


def raise_opset(c: Context) -> None:
    """Convert to the opset that the code and scale types need; the constants stay as they are."""
    wanted = max((needed_opset(c, n) for n in c.quantizers), default=0)
    model = c.view.model
    if model.ByteSize() > CONVERTIBLE_BYTES or wanted <= c.view.opset():
        return
    try:
        converted = version_converter.convert_version(model, wanted)
    except Exception:  # the converter raises bare RuntimeErrors; the finding then remains
        return
    constants = {t.name: t for t in model.graph.initializer}
    fresh = [constants.get(t.name, t) for t in converted.graph.initializer]
    missing = [t for name, t in constants.items() if name not in {x.name for x in fresh}]
    kept = [onnx.TensorProto.FromString(t.SerializeToString()) for t in (*fresh, *missing)]
    model.CopyFrom(converted)
    del model.graph.initializer[:]
    del model.graph.value_info[:]  # the converter records the older opset's types
    model.graph.initializer.extend(kept)


def drop_single_operands(c: Context) -> None:
    """Leave an operator in float whose other operand is float."""
    broken = {name for name, _ in one_operand_only(c)}
    for site in (s for s in c.sites if s.node.name in broken):
        _to_float(c, site)


def drop_deconvolutions(c: Context) -> None:
    """Leave ConvTranspose in float."""
    broken = {name for name, _ in deconvolution(c)}
    for site in (s for s in c.sites if s.node.name in broken):
        _to_float(c, site)


def drop_large_kernels(c: Context) -> None:
    """Leave fp8 convolutions with large kernels in float."""
    broken = {name for name, _ in large_fp8_kernel(c)}
    for site in (s for s in c.sites if s.node.name in broken):
        _to_float(c, site)


def _to_float(c: Context, site: Site) -> None:
    for operand in site.operands:
        unquantize(c, site.node, operand.slot)


def drop_scores(c: Context) -> None:
    """Remove Q/DQ between the scores and the softmax."""
    for softmax in c.view.of_type("Softmax"):
        dq = scores_dequantizer(c, softmax)
        q = None if dq is None else pair_of(c, dq)
        if dq is not None and q is not None:
            replace_uses(c, dq.output[0], q.input[0])


def drop_partial_attention(c: Context) -> None:
    """Leave q, k, softmax output and v in float where only some of them are quantized."""
    for block in attention_blocks(c.view):
        if 0 < len(quantized_operands(c, block)) < 4:
            for node, slot in block.operands.values():
                unquantize(c, node, slot)


def merge_quantizers(c: Context) -> None:
    """One QuantizeLinear for all consumers that quantize a tensor in the same way."""
    broken = {name for name, _ in duplicate_quantizers(c)}
    for q in [n for n in c.quantizers if n.name in broken]:
        first = next((n for n, slot in c.view.consumers[q.input[0]] if _same(c, n, q, slot)), None)
        if first is not None:
            replace_uses(c, q.output[0], first.output[0])


def _same(c: Context, node: NodeProto, q: NodeProto, slot: int) -> bool:
    if node is q or slot != 0 or node.op_type != q.op_type or c.code_type(node) != c.code_type(q):
        return False
    a, b = c.view.constant(node.input[1]), c.view.constant(q.input[1])
    return a is not None and b is not None and a.tobytes() == b.tobytes()
