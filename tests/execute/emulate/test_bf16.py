"""bfloat16 graphs as float32 graphs that round every stored tensor."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from qcompile.execute.emulate.bf16 import emulate_bf16, round_stored
from qcompile.ir.model import Model
from tests.passes.measures import outputs

BF16 = ml_dtypes.bfloat16
RNG = np.random.default_rng(0)


def half_body(dtype: int = TensorProto.BFLOAT16) -> Model:
    """x float -> Cast -> MatMul -> Reshape -> Mul -> Cast -> y float, the middle in `dtype`."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    weights = {"w": RNG.standard_normal((8, 8)), "s": np.asarray(300.0)}
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], name="down", to=dtype),
        helper.make_node("MatMul", ["h", "w"], ["m"], name="fc"),
        helper.make_node("Reshape", ["m", "shape"], ["r"], name="move"),
        helper.make_node("Mul", ["r", "s"], ["p"], name="scale"),
        helper.make_node("Cast", ["p"], ["y"], name="up", to=TensorProto.FLOAT),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", ["N", 8]), ("y", None))]
    constants = [numpy_helper.from_array(v.astype(kind), n) for n, v in weights.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [*constants, numpy_helper.from_array(np.array([-1]), "shape")])
    infos = [helper.make_tensor_value_info(n, dtype, None) for n in "hmrp"]
    graph.value_info.extend(infos)
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10))


def test_every_stored_tensor_is_rounded() -> None:
    model = half_body()
    weight, x = model.graph.initializers["w"].const_value, RNG.standard_normal((4, 8)).astype(np.float32)
    assert weight is not None
    w = weight.numpy().astype(np.float32)
    assert emulate_bf16(model.graph)
    got = outputs(model, {"x": x})[0]
    product = (x.astype(BF16).astype(np.float32) @ w).astype(BF16).astype(np.float32)
    expected = (product * np.float32(300)).astype(BF16).astype(np.float32)
    np.testing.assert_allclose(got, expected.reshape(-1), rtol=2**-7, atol=0)
    assert np.array_equal(got, got.astype(BF16).astype(np.float32)), "the output is a bfloat16 number"
    assert (got == expected.reshape(-1)).mean() > 0.9, "sums differ in their order only"


def test_no_bfloat16_is_left_but_in_casts() -> None:
    model = half_body()
    emulate_bf16(model.graph)
    narrow = [v for n in model.graph for v in n.outputs if v.dtype == ir.DataType.BFLOAT16]
    assert narrow and all(v.producer() is not None and v.producer().op_type == "Cast" for v in narrow)  # type: ignore[union-attr]
    assert all(v.dtype != ir.DataType.BFLOAT16 for v in model.graph.initializers.values())
    assert not emulate_bf16(half_body(TensorProto.FLOAT16).graph), "nothing to do without bfloat16"


def test_float16_stored_strictly_overflows_where_onnx_runtime_hides_it() -> None:
    model = half_body(TensorProto.FLOAT16)
    x = np.full((1, 8), 200.0, np.float32)
    assert round_stored(model.graph, ir.DataType.FLOAT16)
    assert np.isinf(outputs(model, {"x": x})[0]).any()
