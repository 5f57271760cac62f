from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from qcompile.ir.infer import infer_shapes, restore_declared
from qcompile.ir.model import Model
from qcompile.ir.verify import verify_interface, verify_structure
from qcompile.pipeline import registry
from tests.passes.forms.small import apply, ops
from tests.passes.measures import op_types
from tests.passes.models import fixture
from tests.passes.running import fixture_step

CANONICALIZE = registry.parse("canonicalize")[0]
W = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)


def info(name: str, shape: Any = ("N", 8), elem: int = T.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, elem, shape)


def model_of(
    nodes: list[onnx.NodeProto], outputs: list[onnx.ValueInfoProto], opset: int = 17, x: Any = ("N", 8), **more: Any
) -> Model:
    weights = {"w": W, "half": np.array(4, np.int64), "i0": np.array(0, np.int64), **more.pop("weights", {})}
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "g", [info("x", x)], outputs, initializers, **more)
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


def outputs(model: Model, x: np.ndarray = X) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return [np.asarray(y) for y in ort.InferenceSession(model.to_proto().SerializeToString(), options).run(None, {"x": x})]


def canonical(model: Model, x: np.ndarray = X) -> Model:
    """The canonical model, which is sound, has the same interface and computes the same."""
    after, _, _ = apply(CANONICALIZE, model)
    verify_structure(after, "canonicalize")
    verify_interface(model, after, "canonicalize")
    for a, b in zip(outputs(model, x), outputs(after, x), strict=True):
        assert a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-6)
    return after


def test_attention_of_opset_23_is_taken_apart() -> None:
    assert "Attention" in op_types(fixture("timm_vit_dy23"))
    done = fixture_step("timm_vit_dy23", "canonicalize", "trt")
    assert "Attention" not in op_types(done.after) and op_types(done.after).count("Softmax") == 2


def test_outputs_that_are_copies_keep_their_names() -> None:
    """Of another output, of an input, of a constant; a chain in between goes."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Identity", ["h"], ["a"]),
        helper.make_node("Identity", ["a"], ["b"]),
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Identity", ["w"], ["weight"]),
        helper.make_node("Identity", ["a"], ["i"]),
        helper.make_node("Relu", ["i"], ["y"]),
    ]
    after = canonical(model_of(nodes, [info(n) for n in ("h", "a", "b", "same", "y")] + [info("weight", (8, 8))]))
    assert ops(after) == ["MatMul", "Identity", "Identity", "Identity", "Relu"]


def test_an_output_behind_identity_takes_the_name() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Identity", ["h"], ["y"])]
    assert ops(canonical(model_of(nodes, [info("y")]))) == ["MatMul"]


def test_a_branch_may_hand_out_what_lies_outside() -> None:
    keep = helper.make_graph([helper.make_node("Identity", ["h"], ["k"])], "keep", [], [info("k", None)])
    inner = helper.make_node("If", ["big"], ["k2"], then_branch=keep, else_branch=_renamed(keep, "k3"))
    other = helper.make_graph([inner], "other", [], [info("k2", None)])
    relu = helper.make_graph([helper.make_node("Relu", ["h"], ["r"])], "relu", [], [info("r", None)])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("ReduceMax", ["h"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "limit"], ["big"]),
        helper.make_node("If", ["big"], ["y"], then_branch=relu, else_branch=other),
    ]
    canonical(model_of(nodes, [info("y")], weights={"limit": np.float32(1e9)}))


def _renamed(graph: onnx.GraphProto, name: str) -> onnx.GraphProto:
    copy = onnx.GraphProto()
    copy.CopyFrom(graph)
    copy.node[0].output[0] = copy.output[0].name = name
    return copy


def test_a_body_may_hand_out_one_value_twice() -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["s", "n"], ["s2"]), helper.make_node("Identity", ["s2"], ["scan"])],
        "body",
        [info("s", (8,)), info("n", (8,))],
        [info("s2", (8,)), info("scan", (8,))],
    )
    nodes = [helper.make_node("Scan", ["start", "x"], ["last", "y"], num_scan_inputs=1, body=body)]
    start = np.zeros(8, np.float32)
    canonical(model_of(nodes, [info("last", (8,)), info("y")], weights={"start": start}))


def test_sequences_stay_sequences() -> None:
    nodes = [
        helper.make_node("SplitToSequence", ["x", "size"], ["parts"], axis=1),
        helper.make_node("SequenceAt", ["parts", "i0"], ["p"]),
        helper.make_node("SequenceInsert", ["parts", "p"], ["more"]),
        helper.make_node("ConcatFromSequence", ["more"], ["y"], axis=1),
    ]
    unknown = helper.make_node("ReduceMax", ["halves"], ["size"], keepdims=0)
    model = model_of([unknown, *nodes], [info("y", None)], weights={"halves": np.array([3, 4], np.int64)})
    after = model.clone()
    infer_shapes(after)
    assert np.array_equal(outputs(model)[0], outputs(after)[0])
    canonical(model)


def test_a_sequence_of_equal_parts_becomes_a_split_of_its_opset() -> None:
    nodes = [
        helper.make_node("SplitToSequence", ["x", "half"], ["parts"], axis=1),
        helper.make_node("SequenceAt", ["parts", "i0"], ["y"]),
    ]
    assert ops(canonical(model_of(nodes, [info("y", None)]))) == ["Split"]


def test_dropout_that_trains_stays() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Dropout", ["h", "ratio", "training"], ["y"], seed=1),
    ]
    weights = {"ratio": np.float32(0.5), "training": np.array(True)}
    after, _, _ = apply(CANONICALIZE, model_of(nodes, [info("y")], weights=weights))
    assert ops(after) == ["MatMul", "Dropout"]


def test_wrong_shapes_are_not_believed() -> None:
    """Declared for inner tensors and for an output whose shape the model computes."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 2, 0]),
        helper.make_node("Shape", ["t"], ["s"]),
        helper.make_node("Gather", ["s", "i0"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "a0"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["to"], axis=0),
        helper.make_node("Reshape", ["t", "to"], ["y"]),
    ]
    weights = {"a0": np.array([0]), "rest": np.array([1, -1])}
    stale = [info("t", (5, 5, 5)), info("n1", (7,), T.INT64)]
    source = model_of(nodes, [info("y", (1, "seq"))], x=(2, "T", 3), weights=weights, value_info=stale)
    after = canonical(source, np.arange(30, dtype=np.float32).reshape(2, 5, 3))
    assert after.graph.outputs[0].shape is None or len(after.graph.outputs[0].shape) == 3


def test_a_declared_output_comes_back_unless_it_is_wrong() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    source = model_of(nodes, [info("a", ("batch", 8)), info("b", (1, "rows", 8))])
    after = canonical(source)
    (line,) = restore_declared(after, source)
    assert "'b' is declared as" in line
    a, b = after.graph.outputs
    assert a.shape is not None and list(map(str, a.shape)) == ["batch", "8"]
    assert b.shape is not None and len(b.shape) == 2


def test_pads_of_some_axes_are_written_out() -> None:
    """ONNX Runtime's optimizer takes the short form for the long one."""
    nodes = [helper.make_node("Pad", ["x", "pads", "", "axes"], ["y"])]
    weights = {"pads": np.array([1, 2]), "axes": np.array([-1])}
    after = canonical(model_of(nodes, [info("y", None)], opset=18, weights=weights))
    (pad,) = after.graph
    assert len(pad.inputs) == 2 and pad.inputs[1] is not None and pad.inputs[1].const_value is not None
    assert pad.inputs[1].const_value.numpy().tolist() == [0, 1, 0, 2]


def test_a_short_time_spectrum_keeps_its_width() -> None:
    """onnx's inference gives an STFT without `onesided` 16 columns; it makes 9."""
    weights = {"step": np.array(4), "size": np.array(16), "window": np.hanning(16).astype(np.float32)}
    nodes = [helper.make_node("STFT", ["x", "step", "window", "size"], ["s"])]
    after = canonical(model_of(nodes, [info("s", None)], x=(3, 64, 1), weights=weights), X.repeat(8, 1).reshape(3, 64, 1))
    assert after.graph.outputs[0].shape == [3, 13, 9, 2]
