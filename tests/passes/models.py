"""Models and made-up inputs that the tests of passes are run on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from qcompile.ir.model import Model
from tests.passes.quantized import SPELLINGS
from tests.passes.text import read_model
from tests.structure.exports import FOLDER, INDEX

SAMPLES = 8
QUANTIZED = ("modelopt", "brevitas", "operators")
"""Models that hold Q/DQ nodes or operators on codes, for the passes that read those."""
GRAPHS = Path(__file__).parent / "graphs"


Feeds = dict[str, NDArray[Any]]


def fixture(name: str) -> Model:
    """A real exporter's file, or a small graph that no exporter file holds."""
    made = {"stem": stem, "joined": joined, "biased": biased}
    if name in QUANTIZED:
        return Model.from_proto(onnx.shape_inference.infer_shapes(SPELLINGS[name]()))
    if (GRAPHS / f"{name}.txt").exists():
        return read_model((GRAPHS / f"{name}.txt").read_text(encoding="utf-8")).model
    return made[name]() if name in made else Model.load(FOLDER / INDEX[name]["file"])


def block() -> Model:
    """LayerNormalization -> packed qkv -> attention -> projection -> residual -> norm -> MLP with GELU."""
    return fixture("block")


def linear() -> Model:
    """One MatMul + Add."""
    return fixture("linear")


def fixture_arrays(name: str, samples: int = SAMPLES, seed: int = 0) -> Feeds:
    """Random inputs [samples, ...] of a fixture; tokens are 0 or 1, and no row of a mask is empty."""
    rng = np.random.default_rng(seed)
    if name not in INDEX:
        (x,) = fixture(name).inputs()
        return {"x": rng.standard_normal((samples, *(int(d) for d in x.shape[1:]))).astype(np.float32)}
    made: Feeds = {}
    for info in INDEX[name]["inputs"]:
        shape = (samples, *info["shape"][1:])
        array = rng.integers(0, 2, shape) if info["dtype"].startswith("int") else rng.standard_normal(shape)
        if "mask" in info["name"]:
            array[:, 0] = 1
        made[info["name"]] = array.astype(info["dtype"])
    return made


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
