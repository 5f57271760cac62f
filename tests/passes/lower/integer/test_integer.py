"""The integer-only form: purity, bit-exactness over ONNX Runtime's levels and onnx.reference, accuracy, and refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qcompile.errors import ModelError
from qcompile.execute.session import make_session
from qcompile.ir.model import Model
from qcompile.oracle.ranges import prove
from qcompile.oracle.run import decode, encode, run_integer
from qcompile.passes.lower.integer.emit import INT64, Emitter
from qcompile.passes.lower.integer.norm import square_root
from qcompile.passes.lower.integer.requant import clip
from qcompile.pipeline import registry
from qcompile.pipeline.planner import complete
from tests.passes.measures import outputs, sqnr_db
from tests.passes.models import Feeds, block, built, fixture, fixture_arrays
from tests.passes.running import context, run_passes

node = helper.make_node
RNG = np.random.default_rng(0)
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


def weights(**shapes: Sequence[int]) -> dict[str, Any]:
    return {n: (RNG.standard_normal(tuple(s)) * 0.3).astype(np.float32) for n, s in shapes.items()}


def lowered(model: Model, arrays: Feeds, passes: str = "", scheme: str = "w8a8", **options: Any) -> Model:
    ctx = context("integer", scheme, **options)
    return run_passes(model, complete(registry.parse(passes), ctx.target, ctx.scheme).passes, arrays, ctx)[0]


def require_pure(proto: onnx.ModelProto) -> None:
    """No float tensor but the boundaries'; standard operators only."""
    onnx.checker.check_model(proto)
    known = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*known.value_info, *known.output)}
    made = [(n.op_type, types[o]) for n in proto.graph.node for o in n.output]
    assert not [op for op, t in made if t in FLOATS and op != "DequantizeLinear"]
    assert all(not n.domain for n in proto.graph.node)
    numbers = {v.name for v in proto.graph.input if v.type.tensor_type.elem_type in FLOATS}
    assert all(n.op_type == "QuantizeLinear" for n in proto.graph.node if numbers & set(n.input))


def require_exact(proto: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]]) -> None:
    """The same bits at every optimization level, for one and two threads, and in onnx.reference."""
    data = proto.SerializeToString()
    runs = [
        make_session(data, optimize=level, threads=threads, use=["CPUExecutionProvider"]).run(None, dict(feeds))  # type: ignore[arg-type]
        for level in ("off", "basic", "all")
        for threads in (1, 2)
    ]
    runs.append(ReferenceEvaluator(proto).run(None, dict(feeds)))
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for run in runs for a, b in zip(run, runs[0], strict=True))


def check(model: Model, arrays: Feeds, least_db: float, passes: str = "") -> Model:
    made = lowered(model, arrays, passes)
    proto = made.to_proto()
    require_pure(proto)
    require_exact(proto, {n: a[:3] for n, a in arrays.items()})
    assert sqnr_db(outputs(model, arrays)[0], outputs(made, arrays)[0]) > least_db
    return made


def cnn() -> Model:
    """Everything that convolutional nets are made of."""
    constants = weights(
        w1=(8, 3, 3, 3), b1=(8,), w2=(8, 1, 3, 3), w3=(8, 8, 1, 1), b3=(8,), w4=(8, 8, 3, 3), wh=(10, 16), bh=(10,)
    )
    constants |= {"zero": np.float32(0), "six": np.float32(2), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], name="stem", pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"], name="relu1"),
        node("Conv", ["r1", "w2"], ["c2"], name="depthwise", group=8, pads=[1, 1, 1, 1]),
        node("Clip", ["c2", "zero", "six"], ["r2"], name="clip"),
        node("Conv", ["r2", "w3", "b3"], ["c3"], name="pointwise"),
        node("Add", ["c3", "r1"], ["a1"], name="residual"),
        node("Relu", ["a1"], ["r3"], name="relu3"),
        node("MaxPool", ["r3"], ["p1"], name="max", kernel_shape=[2, 2], strides=[2, 2]),
        node("Pad", ["p1", "pads"], ["d1"], name="pad"),
        node("Conv", ["d1", "w4"], ["c4"], name="conv4"),
        node("AveragePool", ["p1"], ["v1"], name="mean3", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
        node("Concat", ["c4", "v1"], ["j1"], name="join", axis=1),
        node("GlobalAveragePool", ["j1"], ["g1"], name="gap"),
        node("Flatten", ["g1"], ["f1"], name="flatten"),
        node("Gemm", ["f1", "wh", "bh"], ["y"], name="head", transB=1),
    ]
    return built(nodes, ("n", 3, 8, 8), constants)


def images(samples: int = 16, shape: Sequence[int] = (3, 8, 8)) -> Feeds:
    return {"x": RNG.standard_normal((samples, *shape)).astype(np.float32)}


def test_convolutional_net() -> None:
    made = check(cnn(), images(), 25.0)
    assert made.metadata["qcompile.rounding"] == "half_up" and made.metadata["qcompile.integer"] == "strict"


def test_transformer_block() -> None:
    check(block(), {"x": RNG.standard_normal((16, 5, 16)).astype(np.float32)}, 25.0, "smooth,bias-correct")


@pytest.mark.parametrize("name", ["timm_vit_dy23", "stem"])
def test_exported_models(name: str) -> None:
    check(fixture(name), fixture_arrays(name), 20.0)


@pytest.mark.parametrize("mask", [-1e4, -3.4028235e38, -np.inf])
def test_causal_masks_of_any_size(mask: float) -> None:
    upper = np.where(np.triu(np.ones((6, 6)), 1) > 0, mask, 0.0).astype(np.float32)
    nodes = [
        node("MatMul", ["x", "wq"], ["q"], name="q"),
        node("Transpose", ["x"], ["k"], name="k", perm=[0, 2, 1]),
        node("MatMul", ["q", "k"], ["s"], name="scores"),
        node("Add", ["s", "mask"], ["m"], name="masked"),
        node("Softmax", ["m"], ["p"], name="softmax", axis=-1),
        node("MatMul", ["p", "x"], ["y"], name="values"),
    ]
    check(built(nodes, ("n", 6, 8), weights(wq=(8, 8)) | {"mask": upper}), images(shape=(6, 8)), 25.0)


@pytest.mark.parametrize("op", ["Sigmoid", "Tanh", "HardSwish", "Elu", "LeakyRelu", "Softplus", "Erf", "Mish"])
def test_functions_by_table(op: str) -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"], name="fc"), node(op, ["a"], ["y"], name="f")]
    check(built(nodes, ("n", 8), weights(w=(8, 8)), opset=18), images(shape=(8,)), 30.0)


@pytest.mark.parametrize("gamma", [np.array([1.0, -2.0, 0.0, 1e-3] * 4, np.float32), np.ones(16, np.float32) * 50])
def test_norms_of_odd_scales(gamma: NDArray[np.float32]) -> None:
    nodes = [node("LayerNormalization", ["x", "g", "b"], ["y"], name="norm", axis=-1)]
    arrays: Feeds = {"x": (RNG.standard_normal((16, 4, 16)) * np.geomspace(1e-2, 1e2, 16)).astype(np.float32)}
    check(built(nodes, ("n", 4, 16), {"g": gamma} | weights(b=(16,))), arrays, 45.0)


def test_scales_above_one_and_dead_channels() -> None:
    constants = weights(w=(8, 8), v=(8, 8))
    constants["w"][:, 3] = 0
    constants["w"] *= 1e4
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="a"),
        node("Relu", ["a"], ["r"], name="relu"),
        node("MatMul", ["r", "v"], ["y"], name="b"),
    ]
    check(built(nodes, ("n", 8), constants), images(shape=(8,)), 25.0)


def test_pooling_by_a_mask_and_unit_length() -> None:
    nodes = [
        node("Greater", ["ids", "none"], ["there"], name="there"),
        node("Cast", ["there"], ["m"], name="mask", to=TensorProto.FLOAT),
        node("Gather", ["table", "ids"], ["e"], name="embedding"),
        node("Unsqueeze", ["m", "last"], ["mu"], name="column"),
        node("Mul", ["e", "mu"], ["em"], name="masked"),
        node("ReduceSum", ["em", "one"], ["sum"], name="sum", keepdims=0),
        node("ReduceSum", ["m", "one"], ["count"], name="count", keepdims=1),
        node("Div", ["sum", "count"], ["mean"], name="mean"),
        node("Mul", ["mean", "mean"], ["sq"], name="square"),
        node("ReduceSum", ["sq", "one"], ["energy"], name="energy", keepdims=1),
        node("Add", ["energy", "eps"], ["safe"], name="safe"),
        node("Sqrt", ["safe"], ["length"], name="length"),
        node("Div", ["mean", "length"], ["y"], name="unit"),
    ]
    constants = weights(table=(20, 16)) | {
        "none": np.int64(0),
        "last": np.array([-1]),
        "one": np.array([1]),
        "eps": np.float32(1e-12),
    }
    tensors = [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", 7])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])
    proto = helper.make_model(
        helper.make_graph(nodes, "g", [ids], [y], tensors), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    tokens = RNG.integers(0, 20, (16, 7))
    tokens[:, 0] = 3
    made = lowered(Model.from_proto(proto), {"ids": tokens})
    require_pure(made.to_proto())
    require_exact(made.to_proto(), {"ids": tokens[:3]})
    assert sqnr_db(outputs(Model.from_proto(proto), {"ids": tokens})[0], outputs(made, {"ids": tokens})[0]) > 50.0


@pytest.mark.parametrize("scheme", ["w4a8", "w4a4"])
def test_fewer_bits_use_fewer_codes(scheme: str) -> None:
    made = lowered(cnn(), images(), scheme=scheme)
    require_exact(made.to_proto(), {"x": images(3)["x"]})
    assert [v.dtype for v in made.graph.initializers.values()].count(ir.DataType.INT4) == 5


def test_widths_by_layer() -> None:
    """The last selector wins; 5 bits are stored in 8, 4 bits in 4; the proof finds the same widths in the finished graph."""
    ctx = context("integer", bits=("op:Conv=w4a4", "depthwise=w5a6"))
    made, reports = run_passes(cnn(), complete([], ctx.target, ctx.scheme).passes, images(), ctx)
    require_pure(made.to_proto())
    require_exact(made.to_proto(), {"x": images(3)["x"]})
    remarks = {r.node: r.numbers for r in reports[-1].remarks if r.reason == "cost of the layer a sample"}
    widths = {name: (n["weight_bits"], n["activation_bits"]) for name, n in remarks.items()}
    assert widths.pop("depthwise") == (5, 6) and widths.pop("head") == (8, 8) and set(widths.values()) == {(4, 4)}
    found = {x.node.rpartition("_")[0]: x.to_json() for x in prove(made.to_proto()).layers}
    assert {name: {k: x[k] for k in remarks[name]} for name, x in found.items()} == remarks


def test_cost_counts_products_of_one_sample() -> None:
    ctx = context("integer", "w4a8")
    plan = complete([], ctx.target, ctx.scheme)
    _, reports = run_passes(cnn(), plan.passes, images(), ctx)
    numbers = next(r.numbers for r in reports[-1].remarks if r.reason == "cost a sample")
    macs = 8 * 27 * 64 + 8 * 9 * 64 + 64 * 64 + 8 * 72 * 16 + 160
    assert numbers == {"macs": macs, "bops": macs * 32, "weight_bytes": (216 + 72 + 64 + 576 + 160) // 2}


def require_oracle(proto: onnx.ModelProto, feeds: Feeds) -> None:
    expected, data = decode(proto, run_integer(proto, encode(proto, feeds)))["y"], proto.SerializeToString()
    for level in ("off", "basic", "all"):
        session = make_session(data, optimize=level, threads=1, use=["CPUExecutionProvider"])  # type: ignore[arg-type]
        assert np.array_equal(session.run(None, dict(feeds))[0], expected)  # type: ignore[arg-type]


def products(proto: onnx.ModelProto) -> dict[str, str]:
    """Operator by the name of the float layer."""
    kinds = ("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")
    return {n.name.rpartition("_")[0]: n.op_type for n in proto.graph.node if n.op_type in kinds}


def test_the_fused_profile() -> None:
    """Layers read as int8 become QLinearConv; what feeds the residual stream at 16 bits, and biased products, stay strict."""
    made = lowered(cnn(), images(), "integer{profile=ort-fused}").to_proto()
    require_pure(made)
    require_oracle(made, images(3))
    found = products(made)
    assert {name: found[name] for name in ("stem", "depthwise", "pointwise", "conv4", "head")} == {
        "stem": "ConvInteger", "depthwise": "QLinearConv", "pointwise": "ConvInteger", "conv4": "ConvInteger",
        "head": "MatMulInteger",
    }  # fmt: skip


@pytest.mark.parametrize("bits", [(), ("b=w4a4",)])
def test_fused_products(bits: tuple[str, ...]) -> None:
    """A Relu and a narrower reader become limits of the codes; the last product is read as float."""
    nodes = [
        node("MatMul", ["x", "u"], ["a"], name="a"),
        node("Relu", ["a"], ["r"], name="relu"),
        node("MatMul", ["r", "v"], ["b"], name="b"),
        node("Reshape", ["b", "shape"], ["s"], name="moved"),
        node("MatMul", ["s", "w"], ["y"], name="c"),
    ]
    model = built(nodes, ("n", 8), weights(u=(8, 12), v=(12, 12), w=(6, 3)) | {"shape": np.array([-1, 6])})
    arrays = images(shape=(8,))
    made = lowered(model, arrays, "integer{profile=ort-fused}", bits=bits).to_proto()
    require_pure(made)
    require_oracle(made, arrays)
    assert products(made) == {"a": "QLinearMatMul", "b": "QLinearMatMul", "c": "MatMulInteger"}
    assert [n.name for n in made.graph.node if n.op_type == "Clip"] == (["a_Clip"] if bits else [])


# ---- refusals -----------------------------------------------------------------------------------------------------


def test_what_has_no_integer_form_is_named_with_its_reason() -> None:
    nodes = [
        node("ConvTranspose", ["x", "w"], ["a"], name="up"),
        node("CumSum", ["a", "axis"], ["y"], name="running"),
    ]
    model = built(nodes, ("n", 3, 4, 4), weights(w=(3, 4, 2, 2)) | {"axis": np.int64(1)})
    with pytest.raises(ModelError, match=r"ConvTranspose 'up'.*CumSum 'running'.*--target ort"):
        lowered(model, images(4, (3, 4, 4)))


def test_nothing_can_be_kept_in_float() -> None:
    with pytest.raises(ModelError, match=r"'depthwise': kept in float by --keep-float"):
        lowered(cnn(), images(4), keep_float=("depthwise",))


def test_a_sum_beyond_int32_is_refused() -> None:
    model = built([node("MatMul", ["x", "w"], ["y"], name="wide")], ("n", 140_000), {"w": np.ones((140_000, 2), np.float32)})
    with pytest.raises(ModelError, match=r"wide: its sum can reach.*beyond int32"):
        lowered(model, {"x": np.ones((2, 140_000), np.float32)})


# ---- kernels of ONNX Runtime that the form relies on --------------------------------------------------------------


def emitted(build: Any) -> Any:
    """A model of one int64 input `x` [n, 1] whose output `build(emitter, x)` makes; returns a function that runs it."""
    x = ir.Value(name="x", type=ir.TensorType(INT64), shape=ir.Shape(["n", 1]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="g")
    em = Emitter(graph, context("integer"), at="t")
    graph.outputs.append(build(em, x))
    data = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return lambda a: make_session(data, threads=1, use=["CPUExecutionProvider"]).run(None, {"x": a.reshape(-1, 1)})[0].reshape(-1)


def spread(rng: np.random.Generator, bits: int) -> NDArray[np.int64]:
    edges = [(1 << b) + d for b in range(1, bits) for d in (-1, 0, 1)]
    return np.array([*edges, *(int(rng.integers(1, 1 << b)) for b in range(1, bits) for _ in range(60))], np.int64)


def test_the_square_root_is_exact() -> None:
    values = spread(np.random.default_rng(1), 62)
    roots = np.array([int(v) ** 2 for v in np.random.default_rng(2).integers(1, 2**31, 500)], np.int64)
    every = np.concatenate([values, roots, roots - 1, roots + 1, np.arange(1, 300)])
    got = emitted(square_root)(every)
    assert all(int(g) ** 2 <= int(v) < (int(g) + 1) ** 2 for g, v in zip(got, every, strict=True))


@pytest.mark.parametrize(("lo", "hi", "reach"), [(-128, 127, 2**31 - 1), (-128, 127, 2**40), (-(2**40), 2**40, 2**60)])
def test_clip_is_right_above_2_to_the_31(lo: int, hi: int, reach: int) -> None:
    """ONNX Runtime 1.31's int64 Clip is not: it leaves 2^31 unclipped at 127."""
    values = spread(np.random.default_rng(3), int(reach).bit_length() - 1)
    every = np.concatenate([values, -values])
    got = emitted(lambda em, x: clip(em, x, lo, hi, float(reach)))(every)
    assert np.array_equal(got, np.clip(every, lo, hi))
