"""Models, made-up calibration data and the few verbs that the tests of passes are written with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import ShapeInferencePass

from qcompile.calib.data.dataset import Dataset
from qcompile.calib.data.readers import ArrayReader
from qcompile.calib.observe import Probe, Stat
from qcompile.calib.sweep.provider import SweepStatistics
from qcompile.calib.sweep.sweep import sweep
from qcompile.execute.emulate.runnable import runnable
from qcompile.execute.session import make_session
from qcompile.ir.model import Model
from qcompile.ir.select import Selection
from qcompile.ir.tensors import map_tensors
from qcompile.pipeline import registry
from qcompile.pipeline.base import Pass, PassContext
from qcompile.pipeline.planner import complete
from qcompile.pipeline.runner import Runner
from qcompile.pipeline.spec import format_pipeline
from qcompile.quant.spec import SCHEMES
from qcompile.report import PassReport
from qcompile.target.catalog import TARGETS
from tests.structure.exports import FOLDER, INDEX

SAMPLES = 8
_FLOAT, _DOUBLE = ir.DataType.FLOAT, ir.DataType.DOUBLE
Feeds = dict[str, NDArray[Any]]


def fixture(name: str) -> Model:
    """A real exporter's file, or a small graph that no exporter file holds."""
    made = {"stem": stem, "joined": joined, "biased": biased}
    return made[name]() if name in made else Model.load(FOLDER / INDEX[name]["file"])


def fixture_arrays(name: str, samples: int = SAMPLES, seed: int = 0) -> Feeds:
    """Random inputs [samples, ...] of a fixture; tokens are 0 or 1, and no row of a mask is empty."""
    rng = np.random.default_rng(seed)
    if name in ("stem", "joined", "biased"):
        return {"x": rng.standard_normal((samples, 3, 16, 16)).astype(np.float32)}
    made: Feeds = {}
    for info in INDEX[name]["inputs"]:
        shape = (samples, *info["shape"][1:])
        array = rng.integers(0, 2, shape) if info["dtype"].startswith("int") else rng.standard_normal(shape)
        if "mask" in info["name"]:
            array[:, 0] = 1
        made[info["name"]] = array.astype(info["dtype"])
    return made


def dataset(arrays: Feeds) -> Dataset:
    """Arrays in memory as a data set."""
    reader = ArrayReader(arrays, {n: a.dtype for n, a in arrays.items()}, {})
    return Dataset(reader, tuple(range(len(reader))), tuple(arrays), "made up", random=True)


def context(target: str = "ort", scheme: str = "w8a8", **options: Any) -> PassContext:
    """What a pass is told."""
    chosen = {k: options.pop(k) for k in ("keep_float", "only", "quantize", "bits") if k in options}
    return PassContext(SCHEMES[scheme], TARGETS[target], Selection(**chosen), **options)


@dataclass(frozen=True)
class Step:
    """A model in front of a pass and behind it, and what the pass said."""

    before: Model
    after: Model
    report: PassReport

    @property
    def changed(self) -> bool:
        """Whether nodes, constants, or decisions differ."""
        return self.before.digest() != self.after.digest()


def run_passes(model: Model, passes: Sequence[Pass], arrays: Feeds, ctx: PassContext) -> tuple[Model, list[PassReport]]:
    """Run exactly these passes, with statistics and without verification."""
    return Runner(SweepStatistics(dataset(arrays), threads=1), verify="off").run(model, passes, ctx)


def prefix(p: Pass, ctx: PassContext) -> tuple[Pass, ...]:
    """What the planner puts in front of a pass."""
    plan = complete([p], ctx.target, ctx.scheme)
    return plan.passes[: plan.inserted.index(False)]


def step(p: Pass, model: Model, arrays: Feeds, ctx: PassContext | None = None) -> Step:
    """`p` on `model`, behind the passes that it requires."""
    ctx = ctx or context()
    before, _ = run_passes(model, prefix(p, ctx), arrays, ctx)
    after, reports = run_passes(before, [p], arrays, ctx)
    return Step(before, after, reports[0])


@cache
def fixture_step(name: str, spec: str, target: str = "ort", scheme: str = "w8a8") -> Step:
    """A pass on an exporter fixture; what stands in front of it is run once for all passes."""
    (p,), ctx = registry.parse(spec), context(target, scheme)
    before = _prefixed(name, format_pipeline(prefix(p, ctx)), target, scheme)
    after, reports = run_passes(before, [p], fixture_arrays(name), ctx)
    return Step(before, after, reports[0])


@cache
def _prefixed(name: str, specs: str, target: str, scheme: str) -> Model:
    passes = registry.parse(specs)
    if not passes:
        return fixture(name)
    front = _prefixed(name, format_pipeline(passes[:-1]), target, scheme)
    return run_passes(front, passes[-1:], fixture_arrays(name), context(target, scheme))[0]


def pipeline(text: str, model: Model, arrays: Feeds, ctx: PassContext) -> tuple[Model, list[PassReport]]:
    """A pipeline string, completed and run."""
    return run_passes(model, complete(registry.parse(text), ctx.target, ctx.scheme).passes, arrays, ctx)


def outputs(model: Model, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """All outputs in ONNX Runtime: optimizations off, Q/DQ as they stand."""
    session = make_session(
        runnable(model).to_proto().SerializeToString(), optimize="off", qdq_fusion=False, threads=1, use=["CPUExecutionProvider"]
    )
    batch = _fixed(model)
    if batch is None:
        return [np.asarray(a) for a in session.run(None, dict(feeds))]
    count = len(next(iter(feeds.values())))
    runs = [session.run(None, {n: a[i : i + batch] for n, a in feeds.items()}) for i in range(0, count, batch)]
    return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


def _fixed(model: Model) -> int | None:
    first = model.inputs()[0].shape[0]
    return first if isinstance(first, int) else None


def relative_error(a: Sequence[NDArray[Any]], b: Sequence[NDArray[Any]]) -> float:
    """The largest max|d| / max|y| of all outputs."""
    pairs = [(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(a, b, strict=True)]
    return max(float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-300)) for x, y in pairs)


def sqnr_db(reference: NDArray[Any], candidate: NDArray[Any]) -> float:
    """Signal to noise in dB."""
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    return float(10 * np.log10(np.square(a).sum() / max(float(np.square(a - b).sum()), 1e-300)))


@dataclass
class SweepOf:
    """Statistics measured on another model (a float64 twin has the same tensors, and no kernels)."""

    model: Model
    arrays: Feeds

    def collect(self, model: Model, probes: Sequence[Probe]) -> dict[Probe, Stat]:
        """Answers of the twin."""
        return sweep(self.model, dataset(self.arrays), probes, threads=1)


def to_double(model: Model) -> Model:
    """The same model with every float32 tensor, weight and cast in float64."""
    wide = model.clone()
    map_tensors(wide.ir, _widened)
    for graph in [wide.graph, *wide.graph.subgraphs()]:
        for value in [*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)]:
            if value.dtype == _FLOAT:
                value.type = ir.TensorType(_DOUBLE)
        for node in graph:
            _widen_attributes(node)
    return wide


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().astype(np.float64), name=tensor.name) if tensor.dtype == _FLOAT else tensor


def _widen_attributes(node: ir.Node) -> None:
    if node.op_type == "Cast" and node.attributes["to"].as_int() == _FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(_DOUBLE))
    if node.op_type == "Constant" and "value_float" in node.attributes:
        number = node.attributes.pop("value_float").as_float()
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(np.float64(number)))


def double_outputs(model: Model, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """All outputs of a float64 model in the reference evaluator (ONNX Runtime has few float64 kernels)."""
    wide = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in feeds.items()}
    batch = _fixed(model)
    if batch is not None:
        wide = {n: a[:batch] for n, a in wide.items()}
    return [np.asarray(a) for a in ReferenceEvaluator(model.to_proto()).run(None, wide)]


@cache
def builtin_passes() -> tuple[Pass, ...]:
    """Every registered pass with its default options."""
    return tuple(registry.provider(name) for name in registry.names())


def op_types(model: Model) -> list[str]:
    """Operator types in order."""
    return [node.op_type for node in model.graph]


def constants_of(model: Model) -> dict[str, NDArray[Any]]:
    """Initializers by name."""
    return {n: v.const_value.numpy() for n, v in model.graph.initializers.items() if v.const_value is not None}


def built(
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[Any],
    constants: Mapping[str, Any],
    opset: int = 17,
    outs: Sequence[str] = ("y",),
    elem_type: onnx.TensorProto.DataType = onnx.TensorProto.FLOAT,
) -> Model:
    """A model from nodes with one input `x`; shapes are inferred."""
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in outs]
    x = onnx.helper.make_tensor_value_info("x", elem_type, shape)
    weights = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    graph = onnx.helper.make_graph(list(nodes), "g", [x], ends, weights)
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9)
    model = Model.from_proto(onnx.shape_inference.infer_shapes(proto))
    ShapeInferencePass()(model.ir)
    return model


def stem() -> Model:
    """Stride-2 Conv of a picture, BatchNormalization, Relu, Pad, Conv, Erf GELU in PyTorch's order, pooling, Gemm."""
    rng, node = np.random.default_rng(0), onnx.helper.make_node
    weights = {
        "w1": (16, 3, 3, 3),
        "w2": (16, 16, 3, 3),
        "head": (16, 32),
        "scale": (16,),
        "shift": (16,),
        "mean": (16,),
        "b2": (16,),
    }
    constants = {n: rng.standard_normal(s).astype(np.float32) * 0.3 for n, s in weights.items()}
    constants |= {
        "var": rng.uniform(0.5, 2, 16).astype(np.float32),
        "pads": np.array([0, 0, 0, 0, 0, 0, 1, 1]),
        "zero": np.float32(0),
    }
    constants |= {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
    nodes = [
        node("Conv", ["x", "w1"], ["c1"], name="conv1", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c1", "scale", "shift", "mean", "var"], ["n1"], name="bn1"),
        node("Relu", ["n1"], ["r1"], name="relu1"),
        node("Pad", ["r1", "pads", "zero"], ["p1"], name="pad1"),
        node("Conv", ["p1", "w2", "b2"], ["c2"], name="conv2", strides=[2, 2]),
        node("Div", ["c2", "root"], ["d"], name="div"),
        node("Erf", ["d"], ["e"], name="erf"),
        node("Add", ["e", "one"], ["a"], name="add"),
        node("Mul", ["half", "a"], ["h"], name="half_mul"),
        node("Mul", ["c2", "h"], ["g"], name="gelu"),
        node("GlobalAveragePool", ["g"], ["pooled"], name="pool"),
        node("Flatten", ["pooled"], ["flat"], name="flatten"),
        node("Gemm", ["flat", "head"], ["y"], name="head"),
    ]
    return built(nodes, ["N", 3, 16, 16], constants)


def joined() -> Model:
    """Conv -> Relu -> Conv, and two convolutions of unlike ranges whose joined channels a third one reads."""
    rng, node = np.random.default_rng(4), onnx.helper.make_node
    shapes = {"w0": (8, 3, 3, 3), "wa": (8, 8, 1, 1), "wb": (4, 8, 3, 3), "w": (8, 12, 2, 2), "c0": (8,), "cb": (4,), "c": (8,)}
    shapes["wl"] = (8, 3, 2, 2)
    constants = {n: rng.standard_normal(s).astype(np.float32) * 0.3 for n, s in shapes.items()}
    constants["wb"] *= 20
    constants["w0"] *= np.exp(rng.standard_normal((8, 1, 1, 1))).astype(np.float32)
    nodes = [
        node("Conv", ["x", "w0", "c0"], ["s"], name="first", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Relu", ["s"], ["r"], name="relu"),
        node("Conv", ["r", "wa"], ["a"], name="left"),
        node("Conv", ["a", "wb", "cb"], ["b"], name="right", pads=[1, 1, 1, 1]),
        node("Sigmoid", ["b"], ["g"], name="sigmoid"),
        node("Mul", ["b", "g"], ["h"], name="silu"),
        node("Conv", ["x", "wl"], ["l"], name="skip", strides=[2, 2]),
        node("Concat", ["l", "h"], ["j"], name="join", axis=1),
        node("Conv", ["j", "w", "c"], ["y"], name="conv", pads=[1, 0, 0, 1]),
    ]
    return built(nodes, ["N", 3, 16, 16], constants)


def biased(act: str = "Relu") -> Model:
    """Conv -> BatchNormalization -> Relu -> Conv 1x1: half of the channels stay far above 0, as BatchNormalization says."""
    rng, node = np.random.default_rng(6), onnx.helper.make_node
    shapes = {"w1": (8, 3, 1, 1), "w2": (6, 8, 1, 1), "c2": (6,)}
    constants: dict[str, Any] = {n: rng.standard_normal(s).astype(np.float32) * 0.3 for n, s in shapes.items()}
    constants |= {"mean": np.zeros(8, np.float32), "var": np.square(constants["w1"]).sum((1, 2, 3)), "six": np.float32(6)}
    constants |= {"scale": np.full(8, 0.3, np.float32), "shift": np.float32([4, 4, 4, 4, 0.1, 0, -0.1, 0]), "zero": np.float32(0)}
    nodes = [
        node("Conv", ["x", "w1"], ["z"], name="first"),
        node("BatchNormalization", ["z", "scale", "shift", "mean", "var"], ["n"], name="bn"),
        node(act, ["n", "zero", "six"] if act == "Clip" else ["n"], ["r"], name="act"),
        node("Conv", ["r", "w2", "c2"], ["y"], name="second"),
    ]
    read = {v for n in nodes for v in n.input}
    return built(nodes, ["N", 3, 16, 16], {n: v for n, v in constants.items() if n in read})
