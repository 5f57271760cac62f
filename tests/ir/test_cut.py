"""Cutting a graph: parts run one after the other give the same values, bit for bit, and few activations cross."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from qcompile.ir.cut import Block, cut, part, typed
from qcompile.ir.model import Model
from tests.ir import exports

Arrays = dict[str, NDArray[Any]]


def evaluate(model: Model, feeds: Arrays, outputs: list[str]) -> Arrays:
    """The named tensors of the main graph, every node run on its own."""
    copy = model.clone()
    values = {str(v.name): v for node in copy.graph for v in node.outputs}
    copy.graph.outputs[:] = [values[name] for name in outputs]
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(copy.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"])
    taken = {i.name for i in session.get_inputs()}
    found = session.run(None, {name: array for name, array in feeds.items() if name in taken})
    return dict(zip(outputs, map(np.asarray, found), strict=True))


def run_parts(model: Model, blocks: list[Block], feeds: Arrays) -> Arrays:
    """What the blocks answer, each fed with what the earlier ones gave."""
    known = dict(feeds)
    for block in blocks:
        wanted = dict.fromkeys([*block.gives, *(n for group in block.answers for n in group if n not in feeds)])
        known |= evaluate(part(model, block), known, list(wanted))
    return known


def weights(model: Model, block: Block) -> int:
    return part(model, block).weight_bytes()


@pytest.mark.parametrize("name", sorted(exports.INDEX))
def test_the_parts_of_every_export_compute_the_whole(name: str) -> None:
    model = typed(Model(exports.load(name)))
    outputs = [str(v.name) for v in model.graph.outputs]
    blocks = cut(model, [(o,) for o in outputs], model.weight_bytes() // 5)
    assert len(blocks) > 1
    feeds = exports.feeds(name)
    found, expected = run_parts(model, blocks, feeds), evaluate(model, feeds, outputs)
    assert all(np.array_equal(found[o], expected[o], equal_nan=True) for o in outputs)


@pytest.mark.parametrize("name", [n for n in sorted(exports.INDEX) if "gpt" in n or "vit" in n])
def test_transformers_are_cut_at_the_residual_stream(name: str) -> None:
    model = typed(Model(exports.load(name)))
    blocks = cut(model, [(str(v.name),) for v in model.graph.outputs], model.weight_bytes() // 4)
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    for block in blocks[1:]:
        crossing = [values[n] for n in block.takes if values[n].dtype == ir.DataType.FLOAT and len(values[n].shape or ()) == 3]
        assert len(crossing) == 1, [v.name for v in crossing]
