"""Small quantized models in the spellings of the tools that write them (what each writes was seen in their files)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SHAPE = ("N", 3, 8, 8)


@dataclass
class Writer:
    """Nodes and weights of a model that reads x and makes y."""

    opset: int = 17
    domains: tuple[str, ...] = ()
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    nodes: list[onnx.NodeProto] = field(default_factory=list[onnx.NodeProto])
    weights: list[onnx.TensorProto] = field(default_factory=list[onnx.TensorProto])

    def w(self, name: str, array: Any, dtype: Any = np.float32) -> str:
        """An initializer."""
        self.weights.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def c(self, name: str, array: Any, dtype: Any = np.float32) -> str:
        """A Constant node."""
        tensor = numpy_helper.from_array(np.asarray(array, dtype), name)
        self.nodes.append(helper.make_node("Constant", [], [name], name=f"make_{name}", value=tensor))
        return name

    def n(self, op: str, inputs: list[str], out: str, **attributes: Any) -> str:
        """A node."""
        self.nodes.append(helper.make_node(op, inputs, [out], name=f"{op}_{out}", **attributes))
        return out

    def conv(self, out: int, channels: int) -> NDArray[np.float64]:
        """A 3x3 kernel."""
        return self.rng.normal(size=(out, channels, 3, 3)) * (2 / (9 * channels)) ** 0.5

    def pair(self, x: str, tag: str, scale: Any, zero: Any, dtype: Any, **attributes: int) -> str:
        """Q -> DQ with initializers."""
        s, z = self.w(f"{tag}_s", scale), self.w(f"{tag}_z", zero, dtype)
        self.n("QuantizeLinear", [x, s, z], f"{tag}_q", **attributes)
        return self.n("DequantizeLinear", [f"{tag}_q", s, z], f"{tag}_dq", **attributes)

    def model(self, inner: int = TensorProto.FLOAT) -> onnx.ModelProto:
        """The whole."""
        x, y = (helper.make_tensor_value_info(n, inner, s) for n, s in (("x", SHAPE), ("y", ("N", 6))))
        graph = helper.make_graph(self.nodes, "quantized", [x], [y], self.weights)
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in self.domains)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)

    def head(self, x: str) -> str:
        """Mean over the picture."""
        return self.n("Flatten", [self.n("GlobalAveragePool", [x], f"{x}_mean")], f"{x}_flat")


def columns(w: NDArray[np.float64], limit: int = 127) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Codes and scales of each slice of the first axis."""
    s = np.abs(w).reshape(len(w), -1).max(1) / limit
    return np.rint(w / s.reshape(-1, *[1] * (w.ndim - 1))), s


def norm(b: Writer, x: str, channels: int) -> str:
    """BatchNormalization, one gamma negative, its statistics behind Identity."""
    gamma = np.where(np.arange(channels) == 1, -0.7, b.rng.uniform(0.7, 1.3, channels))
    arrays = (gamma, b.rng.normal(0, 0.2, channels), b.rng.normal(0, 0.2, channels), b.rng.uniform(0.5, 2, channels))
    names = [b.n("Identity", [b.w(f"{x}_p{i}", a)], f"{x}_i{i}") for i, a in enumerate(arrays)]
    return b.n("BatchNormalization", [x, *names], f"{x}_bn")


def modelopt(half: bool = False) -> onnx.ModelProto:
    """Float weight -> Q -> DQ, scales as Constant nodes, BatchNormalization behind, a weight turned behind its DQ; or float16."""
    b, dtype = Writer(19 if half else 17), np.float16 if half else np.float32

    def q(x: str, tag: str, scale: Any, **axis: int) -> str:
        s, z = b.c(f"{tag}_s", scale, dtype), b.c(f"{tag}_z", np.zeros(np.shape(scale)), np.int8)
        b.n("QuantizeLinear", [x, s, z], f"{tag}_q", **axis)
        return b.n("DequantizeLinear", [f"{tag}_q", s, z], f"{tag}_dq", **axis)

    def layer(x: str, tag: str, w: NDArray[np.float64], top: float) -> str:
        _, scale = columns(w)
        return b.n("Conv", [q(x, f"{tag}x", top / 127), q(b.w(f"{tag}w", w, dtype), f"{tag}w", scale, axis=0)], tag, pads=[1] * 4)

    x = b.n("Cast", ["x"], "xh", to=TensorProto.FLOAT16) if half else "x"
    first = layer(x, "a", b.conv(8, 3), 4)
    first = b.n("Relu", [first if half else norm(b, first, 8)], "ar")
    second = b.n("Relu", [b.n("Add", [layer(first, "b", b.conv(8, 8), 6), first], "sum")], "br")
    pooled = b.n("MaxPool", [q(second, "p", 8 / 127)], "pool", kernel_shape=[2, 2], strides=[2, 2])
    w = b.rng.normal(size=(6, 8)) * 0.3
    turned = b.n("Transpose", [q(b.w("lw", w, dtype), "lw", columns(w)[1], axis=0)], "lt", perm=[1, 0])
    made = b.n("MatMul", [q(b.head(pooled), "l", 4 / 127), turned], "m")
    b.n("Add", [made, b.w("lb", b.rng.normal(size=6), dtype)], "yh" if half else "y")
    if half:
        b.n("Cast", ["yh"], "y", to=TensorProto.FLOAT)
    return b.model()


def tensorrt_fp8() -> onnx.ModelProto:
    """TensorRT's own operators, without zero points, at an opset that has no FP8."""
    b = Writer(17, ("trt",))

    def q(x: str, tag: str, top: float) -> str:
        s = b.c(f"{tag}_s", top / 448)
        b.n("TRT_FP8QuantizeLinear", [x, s], f"{tag}_q", domain="trt")
        return b.n("TRT_FP8DequantizeLinear", [f"{tag}_q", s], f"{tag}_dq", domain="trt")

    w, v = b.conv(8, 3), b.rng.normal(size=(8, 6)) * 0.3
    conv = b.n("Conv", [q("x", "x", 4), q(b.w("w", w), "w", np.abs(w).max()), b.w("c", b.rng.normal(size=8))], "a", pads=[1] * 4)
    flat = b.head(b.n("Relu", [conv], "r"))
    b.n("MatMul", [q(flat, "f", 4), q(b.w("v", v), "v", np.abs(v).max())], "y")
    return b.model()


def brevitas(bits: int = 8) -> onnx.ModelProto:
    """Codes cut by Clip, int32 biases behind DQ, uint8 without a zero point behind Relu, BatchNormalization behind a layer."""
    b, limit = Writer(), 2 ** (bits - 1) - 1

    def weight(w: NDArray[np.float64], tag: str) -> tuple[str, NDArray[np.float64]]:
        codes, scale = columns(w, limit)
        bounds = [b.c(f"{tag}_{n}", v, np.int8) for n, v in (("lo", -limit), ("hi", limit))]
        cut = b.n("Clip", [b.w(f"{tag}_codes", codes, np.int8), *bounds], f"{tag}_cut")
        zero = b.c(f"{tag}_z", np.zeros(len(w)), np.int8)
        return b.n("DequantizeLinear", [cut, b.c(f"{tag}_s", scale), zero], f"{tag}_dq", axis=0), scale

    def bias(scale: NDArray[np.float64], tag: str) -> str:
        codes = b.w(f"{tag}_bq", np.rint(b.rng.normal(size=scale.size) * 0.1 / scale), np.int32)
        zero = b.c(f"{tag}_bz", np.zeros(scale.size), np.int32)
        return b.n("DequantizeLinear", [codes, b.c(f"{tag}_bs", scale), zero], f"{tag}_bdq", axis=0)

    def unsigned(x: str, tag: str, top: float) -> str:
        s, z = b.c(f"{tag}_s", top / (2**bits - 1)), b.c(f"{tag}_z", 0, np.uint8)
        codes = b.n("QuantizeLinear", [x, s, z], f"{tag}_q")
        if bits < 8:
            bounds = [b.c(f"{tag}_{n}", v, np.uint8) for n, v in (("lo", 0), ("hi", 2**bits - 1))]
            codes = b.n("Clip", [codes, *bounds], f"{tag}_cut")
        return b.n("DequantizeLinear", [codes, s, z], f"{tag}_dq")

    w, s = weight(b.conv(8, 3), "a")
    first = norm(b, b.n("Conv", [b.pair("x", "x", 4 / 127, 0, np.int8), w, bias(s * 4 / 127, "a")], "ac", pads=[1] * 4), 8)
    seen, step = unsigned(b.n("Relu", [first], "ar"), "r", 5), 5 / (2**bits - 1)
    w, s = weight(b.conv(8, 8), "b")
    second = b.n("Relu", [b.n("Conv", [seen, w, bias(s * step, "b")], "bc", pads=[1] * 4)], "br")
    w, s = weight(b.rng.normal(size=(6, 8)) * 0.3, "l")
    flat = b.pair(b.head(second), "f", 3 / 255, 0, np.uint8)
    b.n("Gemm", [flat, w, bias(s * 3 / 255, "l")], "y", transB=1)
    return b.model()


def operators() -> onnx.ModelProto:
    """Operators on codes, the Relu hidden in a zero point; codes are pooled and flattened."""
    b = Writer(domains=("com.microsoft",))

    def params(tag: str, scale: Any, zero: Any, dtype: Any = np.int8) -> list[str]:
        return [b.w(f"{tag}_s", scale), b.w(f"{tag}_z", zero, dtype)]

    def codes(w: NDArray[np.float64], tag: str) -> tuple[list[str], NDArray[np.float64]]:
        c, s = columns(w, 63)  # sums of pairs stay below 2^15, where CPUs without VNNI saturate
        return [b.w(f"{tag}_codes", c, np.int8), *params(tag, s, np.zeros(len(w)))], s

    x, r = params("x", 8 / 255, 0), params("r", 6 / 255, -128)
    b.n("QuantizeLinear", ["x", *x], "xq")
    w, s = codes(b.conv(8, 3), "a")
    b.n("QLinearConv", ["xq", *x, *w, *r, b.w("ab", np.rint(b.rng.normal(size=8) / (s * 8 / 255)), np.int32)], "aq", pads=[1] * 4)
    w, s = codes(b.conv(8, 8), "b")
    t, u = params("t", 9 / 255, 3), params("u", 14 / 255, -128)
    b.n("QLinearConv", ["aq", *r, *w, *t], "bq", pads=[1] * 4)
    b.n("QLinearAdd", ["bq", *t, "aq", *r, *u], "sq", domain="com.microsoft")
    b.n("MaxPool", ["sq"], "pq", kernel_shape=[2, 2], strides=[2, 2])
    g = params("g", 8 / 255, -128)
    b.n("QLinearGlobalAveragePool", ["pq", *u, *g], "gq", domain="com.microsoft", channels_last=0)
    b.n("Flatten", ["gq"], "fq")
    w, s = codes(b.rng.normal(size=(6, 8)) * 0.3, "l")
    bias = b.w("lb", np.rint(b.rng.normal(size=6) * 0.1 / (s * 8 / 255)), np.int32)
    y = params("y", 6 / 255, 0)
    b.n("QGemm", ["fq", *g, *w, bias, *y], "yq", domain="com.microsoft", transB=1, alpha=1.0)
    b.n("DequantizeLinear", ["yq", *y], "y")
    return b.model()


def tensorflow() -> onnx.ModelProto:
    """Scales of shape [1], zero points in the middle, a negative axis, a quantizer a reader, the output quantized, opset 13."""
    b = Writer(13)
    codes, s = columns(b.conv(8, 3))
    w = b.n("DequantizeLinear", [b.w("wq", codes, np.int8), b.w("ws", s), b.w("wz", np.zeros(8), np.int8)], "wdq", axis=-4)
    c = b.n("Conv", [b.pair("x", "x", [8 / 255], [128], np.uint8), w, b.w("c", b.rng.normal(size=8) * 0.1)], "a", pads=[1] * 4)
    r = b.n("Clip", [c, b.w("lo", 0.0), b.w("hi", 6.0)], "r")
    codes, s = columns(b.conv(8, 1))
    w = b.n("DequantizeLinear", [b.w("dq", codes, np.int8), b.w("ds", s), b.w("dz", np.zeros(8), np.int8)], "ddq", axis=0)
    d = b.n("Conv", [b.pair(r, "r1", [6 / 255], [0], np.uint8), w], "d", pads=[1] * 4, group=8)
    joined = b.n("Add", [b.pair(d, "d", [20 / 255], [120], np.uint8), b.pair(r, "r2", [6 / 255], [0], np.uint8)], "s")
    v = b.rng.normal(size=(8, 6)) * 0.3
    scale = np.abs(v).max() / 127
    wl = b.n("DequantizeLinear", [b.w("lq", np.rint(v / scale), np.int8), b.w("ls", [scale]), b.w("lz", [0], np.int8)], "ldq")
    m = b.n(
        "MatMul", [b.pair(b.head(b.pair(joined, "s", [24 / 255], [100], np.uint8)), "f", [12 / 255], [90], np.uint8), wl], "m"
    )
    b.pair(m, "out", [16 / 255], [120], np.uint8)
    b.nodes[-1].output[0] = "y"
    return b.model()


SPELLINGS: dict[str, Callable[[], onnx.ModelProto]] = {
    "modelopt": modelopt,
    "modelopt-half": lambda: modelopt(half=True),
    "tensorrt-fp8": tensorrt_fp8,
    "brevitas": brevitas,
    "brevitas-4bit": lambda: brevitas(4),
    "operators": operators,
    "tensorflow": tensorflow,
}


def pictures(samples: int = 12) -> NDArray[np.float32]:
    """Inputs of all of them."""
    return np.random.default_rng(1).normal(size=(samples, *(int(d) for d in SHAPE[1:]))).astype(np.float32)
