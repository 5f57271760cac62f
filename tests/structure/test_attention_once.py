"""Placement, rules and audit see the same attention blocks, in what exporters write and in what we make of it."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
import pytest
from onnx import ModelProto

from qcompile.ir.ops import is_op
from qcompile.structure.scores import Scores, find_scores, find_values
from qcompile.target.attention import attention_blocks, attention_products
from qcompile.target.catalog import TARGETS
from qcompile.target.findings import Context
from qcompile.target.tensorrt.checks import quantized_operands
from qcompile.target.view import GraphView
from tests.passes.models import fixture, fixture_arrays
from tests.passes.running import context, pipeline
from tests.structure.exports import INDEX

ATTENTIVE = [name for name, entry in INDEX.items() if entry["attention_blocks"]]
Block = tuple[str, str, str]


def placed(graph: Iterable[ir.Node]) -> list[Block]:
    """Names of Q K^T, softmax and P V as placements find them."""
    found = [(find_scores(n), n, find_values(n)) for n in graph if is_op(n, "Softmax")]
    blocks = [(s.matmul, n, v.matmul) for s, n, v in found if isinstance(s, Scores) and v is not None]
    return [(str(scores.name), str(softmax.name), str(pv.name)) for scores, softmax, pv in blocks]


def judged(model: ModelProto) -> list[Block]:
    """The same names as rules find them."""
    return [(b.scores.matmul.name, b.softmax.name, b.values.matmul.name) for b in attention_blocks(GraphView(model))]


def counted(model: ModelProto) -> list[frozenset[str]]:
    """Names of the products that the audit looks for in fused kernels."""
    return attention_products(GraphView(model))


def products(blocks: Iterable[Block]) -> list[frozenset[str]]:
    return [frozenset({scores, values}) for scores, _, values in blocks]


@pytest.mark.parametrize("name", INDEX)
def test_in_what_exporters_write(name: str) -> None:
    model = fixture(name)
    proto, blocks = model.to_proto(), placed(model.graph)
    native = [frozenset({str(n.name)}) for n in model.graph if is_op(n, "Attention")]
    assert judged(proto) == blocks
    assert counted(proto) == native + products(blocks)
    assert len(counted(proto)) == INDEX[name]["attention_blocks"]


@pytest.mark.parametrize("name", ATTENTIVE)
def test_in_what_we_make_of_it(name: str) -> None:
    lowered, _ = pipeline("annotate{attention=all}", fixture(name), fixture_arrays(name), context("trt"))
    proto, blocks = lowered.to_proto(), placed(lowered.graph)
    assert len(blocks) == INDEX[name]["attention_blocks"]
    assert judged(proto) == blocks and counted(proto) == products(blocks)
    rules = Context(GraphView(proto), TARGETS["trt"], ())
    assert [quantized_operands(rules, b) for b in attention_blocks(rules.view)] == [["q", "k", "softmax", "v"]] * len(blocks)
    if before := placed(fixture(name).graph):
        assert blocks == before
