"""Numbers at the edge of the integer form: wide norms, sums beyond int32, dead channels, negative scales, clamps on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qcompile.errors import ModelError
from qcompile.ir.model import Model
from qcompile.ir.ops import is_op
from qcompile.oracle.ranges import prove
from qcompile.target.check import check
from tests.passes.lower.integer.test_integer import lowered, require_exact, require_pure
from tests.passes.measures import outputs, sqnr_db
from tests.passes.models import Feeds, built

node = helper.make_node


def normal(*shape: int, seed: int = 4) -> NDArray[np.float32]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def integers(*shape: int) -> NDArray[np.int64]:
    return np.random.default_rng(4).integers(0, 40, shape)


def weights(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: 0.3 * normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def proven(model: Model, arrays: Feeds, least_db: float) -> Model:
    """The integer form: no finding of `check`, a complete proof, the same bits everywhere, near the float model."""
    made = lowered(model, arrays)
    proto = made.to_proto()
    require_pure(proto)
    assert [f.to_json() for f in check(proto, "integer") if f.severity == "error"] == []
    assert prove(proto).complete
    require_exact(proto, {name: a[:3] for name, a in arrays.items()})
    assert sqnr_db(outputs(model, arrays)[0], outputs(made, arrays)[0]) > least_db
    return made


def dequantizer(made: Model) -> ir.Node:
    return next(n for n in made.graph if is_op(n, "DequantizeLinear"))


@pytest.mark.parametrize("channels", [3, 127, 160, 768, 3000])
@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
def test_norms_of_any_width_are_proven(op: str, channels: int) -> None:
    """Before: an int64 Clip of numbers beyond 2^31 (QC-INT-012), and sums of squares beyond 2^53 (QC-INT-013)."""
    constants = {"g": normal(channels), "b": normal(channels, seed=5)}
    inputs = ["x", "g", "b"] if op == "LayerNormalization" else ["x", "g"]
    model = built([node(op, inputs, ["y"], name="norm", axis=-1)], ("n", 2, channels), constants, opset=23)
    proven(model, {"x": normal(8, 2, channels) * 3 + 1}, 60.0)


GROUPED = {
    "operator": [node("GroupNormalization", ["x", "g", "b"], ["y"], name="norm", num_groups=4)],
    "instance": [node("InstanceNormalization", ["x", "g", "b"], ["y"], name="norm")],
    "chain": [
        node("Reshape", ["x", "groups"], ["r"], name="split"),
        node("InstanceNormalization", ["r", "one", "zero"], ["i"], name="norm"),
        node("Shape", ["x"], ["s"], name="shape"),
        node("Reshape", ["i", "s"], ["m"], name="merge"),
        node("Mul", ["m", "column"], ["z"], name="gamma"),
        node("Add", ["z", "row"], ["y"], name="beta"),
    ],
}


@pytest.mark.parametrize("form", GROUPED)
@pytest.mark.parametrize("side", [3, 28])
def test_norms_over_groups_of_channels(form: str, side: int) -> None:
    constants = {"g": normal(8), "b": normal(8, seed=5), "column": normal(8, 1, 1), "row": normal(8, 1, 1, seed=5)}
    constants |= {"groups": np.array([0, 4, -1]), "one": np.ones(4, np.float32), "zero": np.zeros(4, np.float32)}
    model = built(GROUPED[form], ("n", 8, side, side), constants, opset=21)
    model.graph.outputs[0].shape = ir.Shape(["n", 8, side, side])
    proven(model, {"x": normal(8, 8, side, side) * 3 + 1}, 60.0)


def test_groups_that_are_scaled_twice_are_refused() -> None:
    constants = {"column": normal(8, 1, 1), "row": normal(8, 1, 1), "groups": np.array([0, 4, -1])}
    constants |= {"one": normal(4), "zero": np.zeros(4, np.float32)}
    with pytest.raises(ModelError, match="it scales groups before it scales channels"):
        lowered(built(GROUPED["chain"], ("n", 8, 3, 3), constants, opset=21), {"x": normal(8, 8, 3, 3)})


def test_integers_cast_to_numbers_are_compared_right() -> None:
    """Before: an int64 Clip of anything that int64 holds (QC-INT-012)."""
    nodes = [
        node("Cast", ["x"], ["f"], name="cast", to=TensorProto.FLOAT),
        node("MatMul", ["f", "w"], ["y"], name="fc"),
    ]
    model = built(nodes, ("n", 6), weights(w=(6, 5)), elem_type=TensorProto.INT64)
    proven(model, {"x": integers(16, 6)}, 25.0)


def time_embedding(scale: float) -> Model:
    nodes = [
        node("Cast", ["x"], ["f"], name="cast", to=TensorProto.FLOAT),
        node("Mul", ["f", "freq"], ["a"], name="angle"),
        node("Sin", ["a"], ["s"], name="sin"),
        node("Cos", ["a"], ["c"], name="cos"),
        node("Concat", ["s", "c"], ["e"], name="embedding", axis=1),
        node("MatMul", ["e", "w"], ["y"], name="fc"),
    ]
    freq = (scale * np.geomspace(1e-3, 1, 8)).astype(np.float32).reshape(1, 8)
    return built(nodes, ("n", 1), weights(w=(16, 5)) | {"freq": freq}, elem_type=TensorProto.INT64)


def test_the_embedding_of_a_time_step_is_a_table_of_its_own() -> None:
    """A table of 256 entries over 0..999 would answer once in 4 rad."""
    proven(time_embedding(1.0), {"x": np.arange(1, 1000, 3).reshape(-1, 1)}, 35.0)


def test_a_sine_over_many_periods_is_refused() -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"], name="fc"), node("Sin", ["a"], ["y"], name="sin")]
    with pytest.raises(ModelError, match=r"sin: one of 256 codes stands for .* rad; compute it outside of the model"):
        lowered(built(nodes, ("n", 8), weights(w=(8, 8))), {"x": normal(16, 8) * 100})


def test_a_last_sum_beyond_int32_is_rounded_into_31_bits() -> None:
    """Before: a Cast to int32 that cuts bits off (QC-INT-006), or nothing said how the output is stored."""
    constants = {"w": normal(8, 4) * 1e-6, "b": np.array([0.3, 1e5, -2e5, 7.0], np.float32)}
    model = built([node("Gemm", ["x", "w", "b"], ["y"], name="fc")], ("n", 8), constants)
    constants["w"][0] = 1e-3
    made = proven(model, {"x": normal(16, 8)}, 60.0)
    stored = dequantizer(made).inputs[0]
    assert stored is not None and stored.dtype == ir.DataType.INT32


def test_a_scaled_product_is_an_output() -> None:
    """Before: nothing said how the output is stored."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="fc"),
        node("Mul", ["a", "a"], ["aa"], name="square"),
        node("Mul", ["aa", "half"], ["y"], name="half"),
    ]
    proven(built(nodes, ("n", 8), weights(w=(8, 8)) | {"half": np.float32(0.5)}), {"x": normal(16, 8)}, 30.0)


@pytest.mark.parametrize("factor", [np.float32(-1), np.array([1, -2, 0, 3, 0, 0.5, -0.1, 1], np.float32), np.float32(0)])
def test_scales_below_zero_and_zero_reach_the_output(factor: NDArray[np.float32]) -> None:
    """Before: DequantizeLinear with such a scale (QC-INT-016), and the offset of a channel of factor 0 was lost."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="fc"),
        node("Mul", ["a", "f"], ["s"], name="scale"),
        node("Add", ["s", "b"], ["y"], name="offset"),
    ]
    made = proven(built(nodes, ("n", 8), weights(w=(8, 8), b=(8,)) | {"f": factor}), {"x": normal(16, 8)}, 30.0)
    scale = dequantizer(made).inputs[1]
    assert scale is not None and scale.const_value is not None and (scale.const_value.numpy() > 0).all()


@pytest.mark.parametrize("dead", [slice(0, 3), slice(0, 8)])
def test_dead_channels_keep_their_bias(dead: slice) -> None:
    """Before: in units of the input's scale, here 4 (the biases are about 1)."""
    constants = weights(w=(8, 8), b=(8,))
    constants["w"] *= 1e-3
    constants["w"][:, dead] = 0
    proven(built([node("Gemm", ["x", "w", "b"], ["y"], name="fc")], ("n", 8), constants), {"x": normal(16, 8) * 200}, 30.0)


def test_a_clamp_on_a_tensor_that_others_read_has_a_format() -> None:
    """Before: nothing said how the clamped tensor is stored."""
    cut = {"first": np.array([0]), "last": np.array([4]), "axis": np.array([1])}
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="fc"),
        node("Clip", ["a", "low", "high"], ["c"], name="clip"),
        node("Slice", ["c", "first", "last", "axis"], ["s"], name="cut"),
        node("Concat", ["s", "a"], ["y"], name="join", axis=1),
    ]
    limits = {"low": np.float32(-0.5), "high": np.float32(0.7)}
    proven(built(nodes, ("n", 8), weights(w=(8, 8)) | limits | cut), {"x": normal(16, 8)}, 30.0)


def test_a_table_in_front_of_softmax() -> None:
    """Before: its answers, on the grid of the scores, did not fit int16."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="fc"),
        node("LeakyRelu", ["a"], ["l"], name="leaky", alpha=0.2),
        node("Softmax", ["l"], ["y"], name="softmax", axis=-1),
    ]
    constants = weights(w=(8, 8))
    constants["w"] *= 200
    proven(built(nodes, ("n", 8), constants), {"x": normal(16, 8)}, 8.0)  # 8-bit codes of logits around 200


def test_an_integer_operator_that_no_rule_allows_is_refused() -> None:
    """Before: it stayed, and `check` found it (QC-INT-002)."""
    nodes = [
        node("CumSum", ["x", "axis"], ["r"], name="running"),
        node("Cast", ["r"], ["f"], name="cast", to=TensorProto.FLOAT),
        node("MatMul", ["f", "w"], ["y"], name="fc"),
    ]
    constants = weights(w=(6, 5)) | {"axis": np.int64(1)}
    model = built(nodes, ("n", 6), constants, elem_type=TensorProto.INT64)
    with pytest.raises(ModelError, match="CumSum 'running': CumSum on integers is not an operator of this target"):
        lowered(model, {"x": integers(16, 6)})


def test_a_vector_that_multiplies_is_refused_by_name() -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"], name="fc"), node("MatMul", ["a", "v"], ["y"], name="score")]
    model = built(nodes, ("n", 3, 6), weights(w=(6, 5)) | {"v": normal(5)})
    with pytest.raises(ModelError, match="MatMul 'score': its constant operand is not a 2-D weight"):
        lowered(model, {"x": normal(16, 3, 6)})


def test_a_branch_that_reads_a_product_is_refused_by_name() -> None:
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, None)  # noqa: E731
    bodies = [helper.make_graph([node("Relu", ["a"], [k], name=k)], k, [], [value(k)]) for k in ("then", "else")]
    branches: dict[str, Any] = dict(zip(("then_branch", "else_branch"), bodies, strict=True))
    nodes = [node("MatMul", ["x", "w"], ["a"], name="fc"), node("If", ["yes"], ["y"], name="choice", **branches)]
    nodes.insert(0, node("ReduceMax", ["x"], ["top"], name="top", keepdims=0))
    nodes.insert(1, node("Cast", ["top"], ["yes"], name="yes", to=TensorProto.BOOL))
    with pytest.raises(ModelError, match="If 'choice': it holds a subgraph"):
        lowered(built(nodes, ("n", 3, 6), weights(w=(6, 5))), {"x": normal(16, 3, 6)})


@pytest.mark.parametrize("op", ["Max", "Min"])
@pytest.mark.parametrize("other", ["tensor", "number"])
def test_the_larger_and_the_smaller_of_tensors(op: str, other: str) -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="first"),
        node("MatMul", ["x", "v"], ["b"], name="second"),
        node(op, ["a", "b" if other == "tensor" else "limit"], ["c"], name="extreme"),
        node("Add", ["c", "b"], ["d"], name="sum"),
        node("MatMul", ["d", "u"], ["y"], name="last"),
    ]
    model = built(nodes, ("n", 16), weights(w=(16, 8), v=(16, 8), u=(8, 4)) | {"limit": np.float32(0.25)})
    made = proven(model, {"x": normal(32, 16)}, 28)
    assert op in [n.op_type for n in made.graph]


@pytest.mark.parametrize("op", ["GlobalMaxPool", "ReduceMax", "ReduceMin"])
def test_extremes_over_axes_are_taken_of_codes(op: str) -> None:
    more = {} if op == "GlobalMaxPool" else {"axes": [2, 3], "keepdims": 0}
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="conv"),
        node(op, ["a"], ["b"], name="pool", **more),
        node("Flatten", ["b"], ["c"], name="flat"),
        node("MatMul", ["c", "v"], ["y"], name="fc"),
    ]
    model = built(nodes, ("n", 3, 6, 6), weights(w=(8, 3, 3, 3), v=(8, 4)))
    made = proven(model, {"x": normal(32, 3, 6, 6)}, 28)
    assert ("ReduceMin" if op == "ReduceMin" else "ReduceMax") in [n.op_type for n in made.graph]


def test_what_has_no_integer_form_is_said_before_anything_is_measured() -> None:
    nodes = [
        node("Log", ["x"], ["a"], name="log"),
        node("Cast", ["a"], ["b"], name="bucket", to=TensorProto.INT64),
        node("Gather", ["w", "b"], ["y"], name="embed"),
    ]
    model = built(nodes, ("n", 4), weights(w=(8, 4)))
    with pytest.raises(ModelError, match=r"Cast 'bucket': it makes integers of numbers.*--target ort"):
        lowered(model, {"x": np.zeros((4, 4), np.float32)})  # Log(0) is infinite


def test_a_computed_index_is_held_to_its_table() -> None:
    nodes = [
        node("Shape", ["x"], ["s"], name="sizes"),
        node("Gather", ["s", "one"], ["length"], name="length"),
        node("Sub", ["length", "unit"], ["last"], name="last"),
        node("Gather", ["table", "last"], ["row"], name="position"),
        node("Add", ["x", "row"], ["z"], name="placed"),
        node("MatMul", ["z", "w"], ["y"], name="fc"),
    ]
    constants = weights(table=(40, 8), w=(8, 4)) | {"one": np.array([1]), "unit": np.array(1)}
    model = built(nodes, ("n", "t", 8), constants)
    proven(model, {"x": normal(32, 6, 8)}, 28)
