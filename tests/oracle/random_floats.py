"""Random float CNNs and MLPs: residuals, concats, odd shapes, dead channels, scales from 1e-4 to 1e4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

Array = NDArray[Any]
ACTIVATIONS = ("Relu", "Relu6", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "SiLU", "HardSwish", "Gelu", "none")
MAGNITUDES = (1.0, 1.0, 1.0, 1e-4, 1e4, 30.0)


@dataclass(frozen=True)
class Case:
    """A float model, 6 samples to calibrate on, and 3 others of a wider range."""

    model: onnx.ModelProto
    data: dict[str, Array]
    wider: dict[str, Array]


@dataclass
class Graph:
    """A graph under construction: `shapes` (without the batch axis) of the tensors that later steps may read.

    `rng` fills the weights; `below(n)`, a number from 0 to n - 1, decides everything else (hypothesis's choice, or `rng`'s).
    """

    rng: np.random.Generator
    below: Callable[[int], int]
    nodes: list[NodeProto] = field(default_factory=list[NodeProto])
    stored: list[TensorProto] = field(default_factory=list[TensorProto])
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    count: int = 0

    def pick(self, *choices: Any) -> Any:
        return choices[self.below(len(choices))]

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low)

    def chance(self, percent: int) -> bool:
        return self.below(100) >= 100 - percent

    def constant(self, array: ArrayLike) -> str:
        name = f"c{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def add(self, op: str, inputs: list[str], shape: tuple[int, ...], **attributes: Any) -> str:
        self.count += 1
        name = f"t{self.count}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"n{self.count}_{op}", **attributes))
        self.shapes[name] = shape
        return name

    def weight(self, *shape: int, channel_axis: int = 0) -> Array:
        """Random weights; some have dead output channels, some an outlier, some an unusual magnitude."""
        w = self.rng.standard_normal(shape) / np.sqrt(max(np.prod(shape) / shape[channel_axis], 1)) * self.pick(*MAGNITUDES)
        if self.chance(30):
            dead = [slice(None)] * len(shape)
            dead[channel_axis] = slice(0, max(shape[channel_axis] // 3, 1))
            w[tuple(dead)] = 0
        if self.chance(20):
            w.flat[0] = 20 * np.abs(w).max()
        return w.astype(np.float32)

    def bias(self, n: int) -> Array:
        return (self.rng.standard_normal(n) * self.pick(0.0, 0.1, 1.0, 100.0)).astype(np.float32)


def activate(g: Graph, x: str) -> str:
    """A random activation function, some composed of several operators."""
    kind, shape = g.pick(*ACTIVATIONS), g.shapes[x]
    if kind == "none":
        return x
    if kind in ("Relu6", "Clip"):
        ends = (0.0, 6.0) if kind == "Relu6" else (-0.5, 1.25)
        return g.add("Clip", [x, *(g.constant(np.float32(e)) for e in ends)], shape)
    if kind == "SiLU":
        return g.add("Mul", [x, g.add("Sigmoid", [x], shape)], shape)
    if kind == "Gelu":
        part = g.add("Erf", [g.add("Div", [x, g.constant(np.float32(2**0.5))], shape)], shape)
        doubled = g.add("Mul", [x, g.add("Add", [part, g.constant(np.float32(1))], shape)], shape)
        return g.add("Mul", [doubled, g.constant(np.float32(0.5))], shape)
    return g.add(kind, [x], shape)


# ---- convolutional ------------------------------------------------------------------------------------------------


def conv(g: Graph, x: str) -> str:
    c, h, w = g.shapes[x]
    groups = c if g.chance(25) else 1
    out = c if groups > 1 else g.between(1, 12)
    k = min(g.pick(1, 2, 3), h, w)
    stride, pad = g.pick(1, 1, 2), g.pick(0, k // 2)
    dilation = 2 if k > 1 and h > 4 and w > 4 and g.chance(20) else 1
    sizes = tuple((n + 2 * pad - (k - 1) * dilation - 1) // stride + 1 for n in (h, w))
    inputs = [x, g.constant(g.weight(out, c // groups, k, k))]
    if g.chance(70):
        inputs.append(g.constant(g.bias(out)))
    made = g.add(
        "Conv",
        inputs,
        (out, *sizes),
        group=groups,
        strides=[stride] * 2,
        pads=[pad] * 4,
        dilations=[dilation] * 2,
        kernel_shape=[k] * 2,
    )
    return activate(g, made)


def residual(g: Graph, x: str) -> str:
    """x plus an earlier tensor of its shape, or plus a convolution of itself."""
    shape = g.shapes[x]
    others = [t for t, s in g.shapes.items() if s == shape and t != x]
    other = g.pick(*others) if others else x
    return activate(g, g.add(g.pick("Add", "Add", "Sub"), [x, other], shape))


def concat(g: Graph, x: str) -> str:
    shape = g.shapes[x]
    others = [t for t, s in g.shapes.items() if s[1:] == shape[1:] and len(s) == len(shape)]
    parts = [x, g.pick(*others)]
    return g.add("Concat", parts, (sum(g.shapes[p][0] for p in parts), *shape[1:]), axis=1)


def pool(g: Graph, x: str) -> str:
    c, h, w = g.shapes[x]
    if min(h, w) < 2:
        return x
    k = g.pick(2, min(3, h, w))
    stride = g.pick(1, 2)
    sizes = tuple((n - k) // stride + 1 for n in (h, w))
    return g.add(g.pick("MaxPool", "AveragePool"), [x], (c, *sizes), kernel_shape=[k, k], strides=[stride] * 2)


def affine(g: Graph, x: str) -> str:
    """Per-channel scale (some 0) and offset, as batch normalization leaves them."""
    shape = g.shapes[x]
    n = (shape[0], *(1,) * (len(shape) - 1)) if len(shape) == 3 else (shape[-1],)
    factor = g.rng.uniform(0.2, 3, n) * g.pick(1, -1)
    if g.chance(20):
        factor.flat[0] = 0
    scaled = g.add("Mul", [x, g.constant(factor.astype(np.float32))], shape)
    return g.add("Add", [scaled, g.constant(g.rng.standard_normal(n).astype(np.float32))], shape)


def instance(g: Graph, x: str) -> str:
    c, h, w = g.shapes[x]
    if h * w < 3:
        return x
    gamma, beta = (g.constant(g.rng.standard_normal(c).astype(np.float32)) for _ in range(2))
    return g.add("InstanceNormalization", [x, gamma, beta], (c, h, w))


def upsample(g: Graph, x: str) -> str:
    c, h, w = g.shapes[x]
    if h * w > 40:
        return x
    scales = g.constant(np.array([1, 1, 2, 2], np.float32))
    return g.add(
        "Resize",
        [x, "", scales],
        (c, 2 * h, 2 * w),
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def pad(g: Graph, x: str) -> str:
    c, h, w = g.shapes[x]
    return g.add("Pad", [x, g.constant(np.array([0, 0, 1, 0, 0, 0, 0, 2]))], (c, h + 1, w + 2))


def cut(g: Graph, x: str) -> str:
    c, *rest = g.shapes[x]
    if c < 2:
        return x
    limits = [g.constant(np.array([v])) for v in (0, c // 2, 1)]
    return g.add("Slice", [x, *limits], (c // 2, *rest))


def head(g: Graph, x: str) -> str:
    c, *_ = g.shapes[x]
    pooled = g.add("GlobalAveragePool", [x], (c, 1, 1))
    flat = g.add("Flatten", [pooled], (c,), axis=1)
    return gemm(g, flat)


# ---- dense --------------------------------------------------------------------------------------------------------


def gemm(g: Graph, x: str) -> str:
    (d,) = g.shapes[x]
    out = g.between(1, 20)
    return activate(g, g.add("Gemm", [x, g.constant(g.weight(out, d)), g.constant(g.bias(out))], (out,), transB=1))


def matmul(g: Graph, x: str) -> str:
    *rest, d = g.shapes[x]
    out = g.between(1, 20) if g.chance(50) else d
    made = g.add("MatMul", [x, g.constant(g.weight(d, out, channel_axis=1))], (*rest, out))
    return activate(g, g.add("Add", [made, g.constant(g.bias(out))], (*rest, out)))


def normalize(g: Graph, x: str) -> str:
    d = g.shapes[x][-1]
    if d < 3:
        return x
    gamma, beta = (g.constant(g.rng.standard_normal(d).astype(np.float32)) for _ in range(2))
    return g.add("LayerNormalization", [x, gamma, beta], g.shapes[x], axis=-1, epsilon=1e-5)


def attend(g: Graph, x: str) -> str:
    """softmax(x x^T / sqrt(d)) x for [T, D]."""
    t, d = g.shapes[x]
    turned = g.add("Transpose", [x], (d, t), perm=[0, 2, 1])
    scores = g.add("Mul", [g.add("MatMul", [x, turned], (t, t)), g.constant(np.float32(d**-0.5))], (t, t))
    return g.add("MatMul", [g.add("Softmax", [scores], (t, t), axis=-1), x], (t, d))


def softmax(g: Graph, x: str) -> str:
    return g.add("Softmax", [x], g.shapes[x], axis=-1)


Step = Callable[[Graph, str], str]
CNN: tuple[Step, ...] = (conv, conv, conv, residual, residual, concat, pool, affine, instance, upsample, pad, cut)
MLP: tuple[Step, ...] = (gemm, gemm, residual, residual, concat, affine, cut)
TOKENS: tuple[Step, ...] = (matmul, matmul, residual, normalize, attend, affine)


def seeded(seed: int) -> Graph:
    """A graph whose choices come from the seed, too."""
    rng = np.random.default_rng(seed)
    return Graph(rng, lambda n: int(rng.integers(n)))


def random_model(g: Graph) -> Case:
    """A model of 3 to 9 layers, convolutional, dense or of tokens."""
    kind = g.pick("cnn", "cnn", "mlp", "tokens")
    shape: tuple[int, ...] = {
        "cnn": (g.between(1, 6), g.between(3, 12), g.between(3, 12)),
        "mlp": (g.between(2, 24),),
        "tokens": (g.between(2, 9), g.between(3, 17)),
    }[kind]
    g.shapes["x"] = shape
    x = {"cnn": conv, "mlp": gemm, "tokens": matmul}[kind](g, "x")
    for _ in range(g.between(2, 8)):
        x = g.pick(*{"cnn": CNN, "mlp": MLP, "tokens": TOKENS}[kind])(g, x)
    if kind == "cnn" and g.chance(60):
        x = head(g, x)
    if kind != "cnn" and g.chance(20):
        x = softmax(g, x)
    outputs = [x] if x != "x" else [activate(g, g.add("Relu", [x], shape))]
    if g.chance(20) and len(g.shapes) > 4:
        outputs.append(list(g.shapes)[-3])
    scale = g.pick(0.01, 1.0, 1.0, 50.0)
    data = {"x": (g.rng.standard_normal((6, *shape)) * scale).astype(np.float32)}
    wider = {"x": (g.rng.standard_normal((3, *shape)) * scale * 1.7).astype(np.float32)}
    return Case(finish(g, list(dict.fromkeys(outputs))), data, wider)


def finish(g: Graph, outputs: list[str]) -> onnx.ModelProto:
    infos = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", *g.shapes[n]]) for n in ("x", *outputs)}
    graph = helper.make_graph(_used(g, outputs), "random", [infos["x"]], [infos[o] for o in outputs], g.stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def _used(g: Graph, outputs: list[str]) -> list[NodeProto]:
    needed, kept = set(outputs), list[NodeProto]()
    for n in reversed(g.nodes):
        if n.output[0] in needed:
            needed.update(n.input)
            kept.append(n)
    return kept[::-1]
