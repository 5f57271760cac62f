"""A trap of ONNX Runtime 1.31: at full optimization it takes the FP8 codes behind a Relu or Clip for integers."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.errors import ModelError
from qcompile.execute.emulate.runnable import runnable
from qcompile.execute.session import Optimize, make_session
from qcompile.ir.model import Model

X = np.array([-3, -1, 1, 3], np.float32)
TRUE = np.array([0, 0, 1, 3], np.float32)


def chain(codes: int, bounds: tuple[float | None, float | None] | None = None) -> Model:
    """Conv by 1 -> Relu (with `bounds`: Clip) -> Q -> DQ."""
    held = [numpy_helper.from_array(np.array(0.5, np.float32), "s"), helper.make_tensor("z", codes, [], [0])]
    held.append(numpy_helper.from_array(np.ones((1, 1, 1), np.float32), "w"))
    names = ["" if b is None else f"b{i}" for i, b in enumerate(bounds or ())]
    held += [numpy_helper.from_array(np.array(b, np.float32), n) for n, b in zip(names, bounds or (), strict=True) if n]
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], name="conv")]
    nodes.append(helper.make_node("Clip" if bounds else "Relu", ["c", *names], ["r"], name="relu"))
    nodes.append(helper.make_node("QuantizeLinear", ["r", "s", "z"], ["q"], name="q"))
    nodes.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="dq"))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 1, 4]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], held)
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9))


def answer(model: Model, optimize: Optimize) -> np.ndarray:
    session = make_session(model.to_proto().SerializeToString(), optimize=optimize, qdq_fusion=False, threads=1)
    return np.asarray(session.run(None, {"x": X[None, None]})[0])[0, 0]


def test_the_trap_is_still_there() -> None:
    """Else `keep_clips` may go."""
    assert np.array_equal(answer(chain(TensorProto.FLOAT8E4M3FN), "all"), X)
    with pytest.raises(ModelError, match="Unexpected data type for QuantizeLinear"):
        answer(chain(TensorProto.FLOAT8E4M3FN, (0, 2)), "all")


@pytest.mark.parametrize("codes", [TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2])
def test_runnable_models_keep_it(codes: int) -> None:
    for level in ("off", "basic", "all"):
        assert np.array_equal(answer(runnable(chain(codes)), level), TRUE)


@pytest.mark.parametrize("bounds", [(0, 2), (None, 2), (-2, None), (-2, 1)])
def test_runnable_models_keep_a_clip(bounds: tuple[float | None, float | None]) -> None:
    low, high = bounds
    for level in ("off", "basic", "all"):
        got = answer(runnable(chain(TensorProto.FLOAT8E4M3FN, bounds)), level)
        assert np.array_equal(got, X.clip(-np.inf if low is None else low, np.inf if high is None else high))


def test_integers_are_left_alone() -> None:
    model = chain(TensorProto.INT8)
    assert runnable(model) is model and np.array_equal(answer(model, "all"), TRUE)
