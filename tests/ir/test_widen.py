"""float16, bfloat16 and float64 computed in float32, between an interface that keeps its types."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from qcompile.execute.compare import comparator
from qcompile.execute.opening import open_model
from qcompile.ir.model import Model
from qcompile.ir.widen import computed, other_floats, widen
from qcompile.pipeline import registry
from qcompile.pipeline.planner import complete
from qcompile.target.catalog import TARGETS
from tests.passes.models import Feeds
from tests.passes.running import context, run_passes

node = helper.make_node
T = onnx.TensorProto
RNG = np.random.default_rng(0)
KINDS = {T.FLOAT16: np.dtype(np.float16), T.BFLOAT16: np.dtype(ml_dtypes.bfloat16), T.DOUBLE: np.dtype(np.float64)}


def graph(nodes: list[onnx.NodeProto], weights: dict[str, Any], ends: tuple[int, int], opset: int = 22) -> Model:
    """x [N, 32] -> y."""
    x, y = (helper.make_tensor_value_info(n, t, ["N", 32]) for n, t in zip("xy", ends, strict=True))
    arrays = [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()]
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("plugin", 1)]
    made = helper.make_graph(nodes, "g", [x], [y], arrays)
    return Model.from_proto(helper.make_model(made, opset_imports=opsets, ir_version=10))


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape) / np.sqrt(shape[0])


def mlp(kind: onnx.TensorProto.DataType, interface: onnx.TensorProto.DataType) -> Model:
    """Linear layers in `kind`, between Casts where the interface has another type."""
    weights = {
        "w": normal(32, 64).astype(KINDS[kind]),
        "v": normal(64, 64).astype(KINDS[kind]),
        "u": normal(64, 32).astype(KINDS[kind]),
    }
    nodes = [
        node("MatMul", ["i", "w"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("MatMul", ["b", "v"], ["c"]),
        node("Relu", ["c"], ["d"]),
    ]
    body = [*nodes, node("MatMul", ["d", "u"], ["o"])]
    cast = [node("Cast", ["x"], ["i"], to=kind), *body, node("Cast", ["o"], ["y"], to=interface)]
    return graph(cast, weights, (interface, interface))


def types(model: Model) -> set[ir.DataType | None]:
    """Of what is computed between the Casts."""
    return {v.dtype for n in model.graph if n.op_type != "Cast" for v in (*n.inputs, *n.outputs) if v is not None}


def interface(model: Model) -> list[tuple[str | None, ir.DataType | None, str]]:
    return [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("float_ends", [True, False])
def test_the_body_is_float32_and_the_interface_stays(kind: onnx.TensorProto.DataType, float_ends: bool) -> None:
    model = mlp(kind, T.FLOAT if float_ends else kind)
    before = interface(model)
    assert widen(model) == {ir.DataType(kind)}
    assert types(model) == {ir.DataType.FLOAT} and interface(model) == before
    assert sum(n.op_type == "Cast" for n in model.graph) == (0 if float_ends else 2), "no Cast of float32 to itself"
    assert not other_floats(model.ir) and not widen(model)
    onnx.checker.check_model(model.to_proto())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["ort", "trt", "openvino"])
def test_every_target_compiles_it(target: str, kind: onnx.TensorProto.DataType) -> None:
    model, ctx = mlp(kind, kind), context(target)
    feeds: Feeds = {"x": RNG.standard_normal((16, 32)).astype(KINDS[kind])}
    passes = complete(registry.parse("smooth"), TARGETS[target], ctx.scheme).passes
    done, reports = run_passes(model, passes, feeds, ctx)
    assert interface(done) == interface(model)
    assert any("computed in float32 instead of" in r.reason for report in reports for r in report.remarks)
    compared = comparator([feeds], 0)
    assert compared.compare(compared.outputs(model), compared.outputs(done)).sqnr_db > 25


def test_bodies_and_constants_are_widened_too() -> None:
    half = np.array(2, np.float16)
    branch = [node("Constant", [], ["two"], value=onnx.numpy_helper.from_array(half, "two")), node("Mul", ["x", "two"], ["t"])]
    out = [helper.make_tensor_value_info("t", T.FLOAT16, ["N", 32])]
    then = helper.make_graph(branch, "then", [], out)
    other = helper.make_graph([node("Relu", ["x"], ["t"])], "other", [], out)
    model = graph(
        [node("If", ["yes"], ["y"], then_branch=then, else_branch=other)], {"yes": np.array(True)}, (T.FLOAT16, T.FLOAT16)
    )
    widen(model)
    assert {v.dtype for n in model.graph.all_nodes() if n.op_type in ("Mul", "Relu") for v in n.inputs if v is not None} == {
        ir.DataType.FLOAT
    }
    onnx.checker.check_model(model.to_proto(), full_check=True)


def test_plugins_keep_their_types() -> None:
    nodes = [node("Relu", ["x"], ["a"]), node("Magic", ["a"], ["b"], name="magic", domain="plugin"), node("Relu", ["b"], ["y"])]
    model = graph(nodes, {}, (T.FLOAT16, T.FLOAT16))
    model.graph.node(1).outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    widen(model)
    (magic,) = [n for n in model.graph if n.op_type == "Magic"]
    assert [v.dtype for v in (*magic.inputs, *magic.outputs) if v is not None] == [ir.DataType.FLOAT16] * 2
    assert {n.outputs[0].dtype for n in model.graph if n.op_type == "Relu"} == {ir.DataType.FLOAT}


def test_numbers_beyond_float32_end_at_its_largest() -> None:
    model = graph([node("Max", ["x", "low"], ["y"])], {"low": np.array([-1.7e308, -np.inf] * 16)}, (T.DOUBLE, T.DOUBLE))
    widen(model)
    low = model.graph.initializers["low"].const_value
    assert low is not None and low.numpy().tolist() == [float(-np.finfo(np.float32).max), -np.inf] * 16


def test_outputs_are_compared_in_front_of_the_last_rounding() -> None:
    model = mlp(T.FLOAT16, T.FLOAT16)
    assert computed(model) is model
    widen(model)
    assert [v.dtype for v in computed(model).graph.outputs] == [ir.DataType.FLOAT]
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT16


def test_copies_of_the_model_keep_their_types() -> None:
    model = mlp(T.FLOAT16, T.FLOAT16)
    copy = model.clone()
    widen(copy)
    assert types(model) - {None} == {ir.DataType.FLOAT16}


def test_a_model_without_kernels_for_its_type_runs_as_its_twin() -> None:
    """ONNX Runtime has no convolution of float64 on the CPU."""
    conv = node("Conv", ["a", "w"], ["b"], pads=[1, 1])
    nodes = [node("Unsqueeze", ["x", "one"], ["a"]), conv, node("Squeeze", ["b", "one"], ["y"])]
    weight = normal(1, 1, 3)
    model = graph(nodes, {"w": weight, "one": np.array([1])}, (T.DOUBLE, T.DOUBLE))
    x = RNG.standard_normal((4, 32))
    y = np.asarray(open_model(model).run(None, {"x": x})[0])
    assert y.dtype == np.float64
    expected = [np.convolve(np.pad(row, 1), weight[0, 0, ::-1], "valid") for row in x]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
