"""Q/DQ nodes of a unified graph taken out: what they did is handed back as quantizers of the nodes that read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.decide.imports import narrower, quantizer_of
from qcompile.decide.quantizer import Quantizer
from qcompile.ir.edit import add_constant, bypass, erase, forget_names, redirect
from qcompile.ir.ops import const_scalar, input_at, is_op
from qcompile.ir.quantizers import DEQUANTIZE, QUANTIZE, Affine, Pair, affine, constants, pairs, take_out
from qcompile.quant.affine import dequantize
from qcompile.rewrite.import_blocks import blocks

Told = Callable[[ir.Node, int, Quantizer], None]
_CODES = "_quantized"


def take_out_all(graph: ir.Graph, told: Told, missed: Callable[[ir.Node, str], None]) -> int:
    """Remove every pair and every DQ of constants that decisions can stand for; how many.

    `told(node, slot, quantizer)`: for each use, slot ~i for output i.  `missed(node, reason)`: of nodes that stay.
    """
    done = _take_out_blocks(graph, told)
    for pair in pairs(graph):
        reason = _kept(pair) or _activation(graph, pair, told)
        done += reason is None
        if reason is not None:
            missed(pair.q, reason)
    for dq, codes in [(dq, codes) for dq, codes in constants(graph) if dq.outputs[0].uses()]:
        reason = _constant(graph, dq, codes, told)
        done += reason is None
        if reason is not None:
            missed(dq, reason)
    forget_names(graph)
    return done


def _take_out_blocks(graph: ir.Graph, told: Told) -> int:
    found = [b for b in blocks(graph) if not b.made.is_graph_output() and all(n.graph is graph for n, _ in b.made.uses())]
    for block in found:
        uses, source, quantizer = list(block.made.uses()), block.source, block.quantizer
        if quantizer.codes is not None:
            values = dequantize(quantizer.codes, quantizer.known, quantizer.spec.granularity)
            source = add_constant(graph, str(source.name).removesuffix(_CODES), values)
        redirect(block.made, source, uses)
        for node, slot in uses:
            told(node, slot, quantizer)
    return len(found)


def _constant(graph: ir.Graph, dq: ir.Node, codes: NDArray[Any], told: Told) -> str | None:
    found, out, source = affine(dq), dq.outputs[0], dq.inputs[0]
    quantizer = None if found is None else _of_constant(found, codes)
    assert source is not None
    if quantizer is None or found is None:
        return "its scale is computed, or of a type that has no decision"
    uses = list(out.uses())
    if out.is_graph_output() or any(n.graph is not graph or is_op(n, QUANTIZE, DEQUANTIZE) for n, _ in uses):
        return "a body, the interface or another quantizer reads it"
    values = dequantize(codes, quantizer.known, quantizer.spec.granularity)
    made = add_constant(graph, str(source.name).removesuffix(_CODES), values)
    redirect(out, made, uses)
    for node, slot in uses:
        told(node, slot, quantizer)
    erase(graph, dq)
    return None


def _of_constant(found: Affine, codes: NDArray[Any]) -> Quantizer | None:
    full = found.scale.ndim < 2 or found.block
    return quantizer_of(found, codes) if full else None


def _kept(pair: Pair) -> str | None:
    """Why a pair stays in the graph."""
    outs, source = [dq.outputs[0] for dq in pair.dqs], pair.source
    uses = [use for out in outs for use in out.uses()]
    if any(out.dtype not in (None, source.dtype) for out in outs):
        return "it changes the type of its tensor"
    if any(node.graph is not pair.q.graph for node, _ in uses):
        return "a body of an If, Loop or Scan reads it"
    alone = len(outs) == 1 == len(list(source.uses())) and source.producer() is not None
    return "the interface hands it out, or quantizes it once more" if _at_output(pair) and not alone else None


def _at_output(pair: Pair) -> bool:
    """Whether the decision belongs to what makes the tensor: the interface, or another quantizer, reads the numbers."""
    outs = [dq.outputs[0] for dq in pair.dqs]
    return any(out.is_graph_output() or any(is_op(n, QUANTIZE) for n, _ in out.uses()) for out in outs)


def _activation(graph: ir.Graph, pair: Pair, told: Told) -> str | None:
    clip, quantizer = _limits(pair)
    if quantizer is None or quantizer.known.scale.ndim > 1:
        return "its type or its blocks have no decision"
    if clip is not None:
        bypass(graph, clip)
    ends = list(_ends(pair))
    take_out(graph, pair)
    for node, slot in ends:
        told(node, slot, quantizer)
    return None


def _limits(pair: Pair) -> tuple[ir.Node | None, Quantizer | None]:
    """The quantizer of a pair; a Clip in front that cuts at the limits of fewer bits, for the pair alone, becomes its width."""
    quantizer, clip = quantizer_of(pair.affine), pair.source.producer()
    if quantizer is None or clip is None or not is_op(clip, "Clip") or pair.source.is_graph_output():
        return None, quantizer
    bounds = [const_scalar(input_at(clip, slot)) for slot in (1, 2)]
    low, high = (None if b is None else b / pair.affine.scale + pair.affine.zero_point for b in bounds)
    if low is None or high is None or low.ndim or len(list(pair.source.uses())) > 1:
        return None, quantizer
    narrow = narrower(quantizer, float(low), float(high))
    return (None, quantizer) if narrow is None else (clip, narrow)


def _ends(pair: Pair) -> Iterable[tuple[ir.Node, int]]:
    """Where the decision of a pair stands."""
    maker, index = pair.source.producer(), pair.source.index()
    if _at_output(pair) and maker is not None and index is not None:
        return [(maker, ~index)]
    return [use for dq in pair.dqs for use in dq.outputs[0].uses()]
