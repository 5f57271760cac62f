"""Cutting a graph: parts run one after the other give the same values, bit for bit, and few activations cross."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qcompile.ir.cut import Block, computed_bytes, cut, part, typed
from qcompile.ir.model import Model
from tests.structure import exports

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


RESIDUAL = {
    "hf_bert_ts17": "LayerNormalization", "timm_vit_ts17": "Add", "timm_vit_shared_ts17": "Add", "hf_gpt2_ts17": "Add",
    "hf_llama_ts17": "Cast",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(RESIDUAL))
def test_transformers_are_cut_at_the_residual_stream(name: str) -> None:
    """Beside it only masks and positions cross: nothing else is as wide as the model."""
    model = typed(Model(exports.load(name)))
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    for block in cut(model, [(str(v.name),) for v in model.graph.outputs], model.weight_bytes() // 2)[1:]:
        crossing = [values[n] for n in block.takes]
        wide = [v.producer() for v in crossing if v.shape is not None and len(v.shape) == 3]
        assert [n.op_type for n in wide if n is not None] == [RESIDUAL[name]]
        assert len(crossing) <= 3


def test_a_chain_is_cut_into_blocks_within_the_limit() -> None:
    model = typed(Model.from_proto(chain(20)))
    each = 16 * 16 * 4
    blocks = cut(model, [("t20",)], 5 * each)
    assert [weights(model, b) for b in blocks] == [5 * each] * 4
    assert [b.takes for b in blocks] == [(), ("t5",), ("t10",), ("t15",)]
    assert [weights(model, b) for b in cut(model, [("t20",)], 1)] == [each] * 20, "a node is never cut"


def test_dequantized_weights_count_as_what_they_become() -> None:
    model = typed(Model.from_proto(chain(20, quantized=True)))
    codes, floats = 16 * 16, 16 * 16 * 4
    assert computed_bytes(model) == 20 * floats and computed_bytes(typed(Model.from_proto(chain(20)))) == 0
    blocks = cut(model, [("t20",)], 5 * (codes + floats + 8))
    assert len(blocks) == 4 and [b.takes for b in blocks] == [(), ("t5",), ("t10",), ("t15",)]


def test_only_what_is_wanted_is_in_the_blocks() -> None:
    model = typed(Model.from_proto(chain(20)))
    blocks = cut(model, [("t3",), ("t1", "t3"), ("t0",)], 2 * 16 * 16 * 4)
    assert sum(weights(model, b) for b in blocks) == 3 * 16 * 16 * 4
    assert [b.answers for b in blocks] == [(("t0",),), (("t3",), ("t1", "t3"))]
    assert blocks[1].takes == ("t1",), "cut where one tensor crosses, not two"


def chain(length: int, *, quantized: bool = False) -> onnx.ModelProto:
    """t0 -> MatMul -> t1 -> ... with weights 16 x 16, of int8 behind DequantizeLinear if `quantized`."""
    name = "d" if quantized else "w"
    nodes = [helper.make_node("MatMul", [f"t{i}", f"{name}{i}"], [f"t{i + 1}"], name=f"m{i}") for i in range(length)]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N", 16]) for n in ("t0", f"t{length}")]
    array = np.eye(16, dtype=np.int8 if quantized else np.float32)
    initializers = [numpy_helper.from_array(array, f"w{i}") for i in range(length)]
    if quantized:
        nodes = [helper.make_node("DequantizeLinear", [f"w{i}", "s"], [f"d{i}"], name=f"q{i}") for i in range(length)] + nodes
        initializers.append(numpy_helper.from_array(np.array(1, np.float32), "s"))
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def test_no_part_has_more_nodes_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.ir.cut.BLOCK_NODES", 12)
    name = "timm_vit_ts17"
    model = typed(Model(exports.load(name)))
    outputs = [str(v.name) for v in model.graph.outputs]
    blocks = cut(model, [(o,) for o in outputs], 1 << 40)
    assert len(blocks) > 1
    assert all(sum(n.op_type != "Constant" for n in part(model, block).graph) <= 12 for block in blocks)
    feeds = exports.feeds(name)
    found, expected = run_parts(model, blocks, feeds), evaluate(model, feeds, outputs)
    assert all(np.array_equal(found[o], expected[o]) for o in outputs)
