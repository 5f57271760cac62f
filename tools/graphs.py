"""Graphs of well-known shapes with random weights, for benchmarks: numbers compare tools on one graph, they are not accuracies.

python tools/graphs.py resnet18 OUT.onnx        python tools/graphs.py vit_tiny OUT.onnx
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto as T
from onnx import helper, numpy_helper

SIDE, CLASSES = 224, 1000
TOKENS, CHANNELS = 8, 16
OUTLIERS, OUTLIER_SCALE = 6, 30.0


class Builder:
    """Collects nodes and weights; every value is named after the node that makes it."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        """An initializer."""
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def he(self, name: str, shape: Sequence[int], fan_in: int) -> str:
        """He-initialised weights."""
        return self.constant(name, self.rng.standard_normal(shape) * np.sqrt(2.0 / fan_in))

    def bias(self, name: str, size: int) -> str:
        """Small random biases (batch normalization is folded)."""
        return self.constant(name, 0.1 * self.rng.standard_normal(size))

    def add(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        """A node with one output, which has the node's name."""
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def model(self, output: str, opset: int) -> onnx.ModelProto:
        """[1, 3, 224, 224] pictures -> [1, 1000] logits."""
        self.nodes[-1].output[0] = "logits"
        assert self.nodes[-1].name == output
        x = helper.make_tensor_value_info("input", T.FLOAT, [1, 3, SIDE, SIDE])
        y = helper.make_tensor_value_info("logits", T.FLOAT, [1, CLASSES])
        graph = helper.make_graph(self.nodes, "g", [x], [y], self.weights)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        onnx.checker.check_model(made)
        return onnx.shape_inference.infer_shapes(made)


def resnet18(seed: int = 0) -> onnx.ModelProto:
    """ResNet-18 with batch normalization folded: 20 convolutions, 8 residual additions, opset 17."""
    b = Builder(seed)
    x = _conv(b, "stem", "input", (3, 64), 7, 2, relu=True)
    x = b.add("MaxPool", "maxpool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    width = 64
    for stage, out in enumerate((64, 128, 256, 512)):
        for i in range(2):
            x = _residual(b, f"layer{stage + 1}.{i}", x, (width, out), 2 if stage and not i else 1)
            width = out
    x = b.add("Flatten", "flatten", [b.add("GlobalAveragePool", "gap", [x])])
    return b.model(b.add("Gemm", "fc", [x, b.he("fc.w", (CLASSES, width), width), b.bias("fc.b", CLASSES)], transB=1), 17)


def vit_tiny(seed: int = 0, blocks: int = 12, dim: int = 192, heads: int = 3) -> onnx.ModelProto:
    """ViT-tiny/16 as exporters write it (fused qkv, Erf form of GELU, opset 18), with transplanted outliers.

    Six channels of every block's norms are 30 times as large and the next linear's rows 30 times as small: the float
    function does not notice, per-tensor int8 activations do.
    """
    b = Builder(seed)
    tokens = (SIDE // 16) ** 2 + 1
    x = b.add("Conv", "patch", ["input", b.he("patch.w", (dim, 3, 16, 16), 768), b.bias("patch.b", dim)], strides=[16, 16])
    x = b.add("Reshape", "patches", [x, b.constant("patches.shape", [1, dim, tokens - 1], np.int64)])
    x = b.add("Transpose", "sequence", [x], perm=[0, 2, 1])
    x = b.add("Concat", "tokens", [b.constant("cls", b.rng.standard_normal((1, 1, dim))), x], axis=1)
    x = b.add("Add", "embedded", [x, b.constant("position", 0.1 * b.rng.standard_normal((1, tokens, dim)))])
    for i in range(blocks):
        x = _block(b, f"b{i}", x, (tokens, dim, heads))
    x, _ = _norm(b, "norm", x, dim, outliers=False)
    x = b.add("Gather", "first", [x, b.constant("zero", 0, np.int64)], axis=1)
    return b.model(b.add("Gemm", "head", [x, b.he("head.w", (CLASSES, dim), dim), b.bias("head.b", CLASSES)], transB=1), 18)


def deep(nodes: int, seed: int = 0) -> onnx.ModelProto:
    """About `nodes` nodes: narrow transformer blocks on [N, 8, 16], opset 18."""
    b, x = Builder(seed), "input"
    while len(b.nodes) < nodes:
        x = _block(b, f"b{len(b.nodes)}", x, (TOKENS, CHANNELS, 2), batch=-1)
    shape = ["N", TOKENS, CHANNELS]
    ends = [helper.make_tensor_value_info(name, T.FLOAT, shape) for name in ("input", x)]
    graph = helper.make_graph(b.nodes, "deep", ends[:1], ends[1:], b.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def pictures(n: int, seed: int = 0) -> NDArray[np.float32]:
    """[n, 3, 224, 224] in [-1, 1]: smooth colour fields with texture, so that neighbouring pixels agree as in photographs."""
    rng = np.random.default_rng(seed)
    out = np.zeros((n, 3, SIDE, SIDE), np.float32)
    for side, weight in ((4, 0.6), (14, 0.3), (56, 0.15), (SIDE, 0.05)):
        coarse = rng.standard_normal((n, 3, side, side), np.float32)
        out += weight * coarse.repeat(SIDE // side, 2).repeat(SIDE // side, 3)
    return np.clip(out, -1, 1)


def vit_b(seed: int = 0) -> onnx.ModelProto:
    """ViT-B/16: `vit_tiny` with 768 channels and 12 heads, 346 MB of weights."""
    return vit_tiny(seed, dim=768, heads=12)


GRAPHS: dict[str, Callable[[], onnx.ModelProto]] = {"resnet18": resnet18, "vit_tiny": vit_tiny, "vit_b": vit_b}


def _conv(b: Builder, name: str, x: str, width: tuple[int, int], kernel: int, stride: int, relu: bool) -> str:
    weight = b.he(f"{name}.w", (width[1], width[0], kernel, kernel), width[0] * kernel * kernel)
    shape: dict[str, Any] = {"kernel_shape": [kernel, kernel], "strides": [stride, stride], "pads": [kernel // 2] * 4}
    y = b.add("Conv", name, [x, weight, b.bias(f"{name}.b", width[1])], **shape)
    return b.add("Relu", f"{name}.relu", [y]) if relu else y


def _residual(b: Builder, name: str, x: str, width: tuple[int, int], stride: int) -> str:
    y = _conv(b, f"{name}.conv1", x, width, 3, stride, relu=True)
    y = _conv(b, f"{name}.conv2", y, (width[1], width[1]), 3, 1, relu=False)
    same = stride == 1 and width[0] == width[1]
    shortcut = x if same else _conv(b, f"{name}.shortcut", x, width, 1, stride, relu=False)
    return b.add("Relu", f"{name}.relu", [b.add("Add", f"{name}.add", [y, shortcut])])


def _norm(b: Builder, name: str, x: str, dim: int, outliers: bool = True) -> tuple[str, NDArray[np.float64]]:
    """The norm's output, and the scale of each of its channels."""
    scale = np.ones(dim)
    if outliers:
        scale[b.rng.choice(dim, OUTLIERS, replace=False)] = OUTLIER_SCALE
    gamma = b.constant(f"{name}.gamma", scale * (1 + 0.1 * b.rng.standard_normal(dim)))
    beta = b.constant(f"{name}.beta", scale * 0.1 * b.rng.standard_normal(dim))
    return b.add("LayerNormalization", name, [x, gamma, beta], axis=-1, epsilon=1e-6), scale


def _linear(b: Builder, name: str, x: str, width: tuple[int, int], scale: NDArray[np.float64] | float = 1.0) -> str:
    """MatMul and Add; the weight's rows are divided by `scale`."""
    weight = b.rng.standard_normal(width) / np.sqrt(width[0]) / np.broadcast_to(scale, width[:1])[:, None]
    y = b.add("MatMul", f"{name}.matmul", [x, b.constant(f"{name}.w", weight)])
    return b.add("Add", name, [y, b.bias(f"{name}.b", width[1])])


def _block(b: Builder, name: str, x: str, sizes: tuple[int, int, int], batch: int = 1) -> str:
    _, dim, _ = sizes
    normed, scale = _norm(b, f"{name}.norm1", x, dim)
    x = b.add("Add", f"{name}.add1", [x, _attention(b, name, normed, scale, sizes, batch)])
    normed, scale = _norm(b, f"{name}.norm2", x, dim)
    hidden = _gelu(b, f"{name}.gelu", _linear(b, f"{name}.fc1", normed, (dim, 4 * dim), scale))
    return b.add("Add", f"{name}.add2", [x, _linear(b, f"{name}.fc2", hidden, (4 * dim, dim))])


def _attention(b: Builder, name: str, x: str, scale: NDArray[np.float64], sizes: tuple[int, int, int], batch: int) -> str:
    tokens, dim, heads = sizes
    x = _linear(b, f"{name}.qkv", x, (dim, 3 * dim), scale)
    x = b.add("Reshape", f"{name}.split", [x, b.constant(f"{name}.split.s", [batch, tokens, 3, heads, dim // heads], np.int64)])
    x = b.add("Transpose", f"{name}.heads", [x], perm=[2, 0, 3, 1, 4])
    q, k, v = (b.add("Gather", f"{name}.{p}", [x, b.constant(f"{name}.{p}.i", i, np.int64)], axis=0) for i, p in enumerate("qkv"))
    q = b.add("Mul", f"{name}.scaled", [q, b.constant(f"{name}.scale", (dim // heads) ** -0.5)])
    scores = b.add("MatMul", f"{name}.qk", [q, b.add("Transpose", f"{name}.kt", [k], perm=[0, 1, 3, 2])])
    y = b.add("MatMul", f"{name}.pv", [b.add("Softmax", f"{name}.softmax", [scores], axis=-1), v])
    y = b.add("Transpose", f"{name}.joined", [y], perm=[0, 2, 1, 3])
    y = b.add("Reshape", f"{name}.merged", [y, b.constant(f"{name}.merged.s", [batch, tokens, dim], np.int64)])
    return _linear(b, f"{name}.proj", y, (dim, dim))


def _gelu(b: Builder, name: str, x: str) -> str:
    """0.5 (1 + erf(x / sqrt 2)) x, in the order of the dynamo exporter."""
    erf = b.add("Erf", f"{name}.erf", [b.add("Div", f"{name}.div", [x, b.constant(f"{name}.sqrt2", 2**0.5)])])
    gate = b.add("Add", f"{name}.add", [erf, b.constant(f"{name}.one", 1.0)])
    return b.add("Mul", name, [x, b.add("Mul", f"{name}.half", [b.constant(f"{name}.c", 0.5), gate])])


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in GRAPHS:
        sys.exit(__doc__)
    onnx.save(GRAPHS[sys.argv[1]](), Path(sys.argv[2]))
