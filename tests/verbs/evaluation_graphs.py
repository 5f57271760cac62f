"""A small float classifier, Q/DQ and folded forms of it, and data for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from qcompile.calib.data import Dataset, load_data
from qcompile.ir.model import Model

DIM, CLASSES = 8, 5
node = helper.make_node


def weights() -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    shapes = {"gamma": (DIM,), "beta": (DIM,), "w1": (DIM, DIM), "w2": (DIM, CLASSES)}
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def save(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, NDArray[Any]], **shapes: Any) -> Path:
    """A model x -> logits; keywords: batch (default "N"), elem (default float32), more outputs by name."""
    elem, batch = shapes.get("elem", T.FLOAT), shapes.get("batch", "N")
    outputs = [helper.make_tensor_value_info("logits", elem, [batch, CLASSES])]
    outputs += [helper.make_tensor_value_info(n, elem, [batch, DIM]) for n in shapes.get("more", ())]
    initializers = [numpy_helper.from_array(v, n) for n, v in constants.items()]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", elem, [batch, DIM])], outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), path)
    return path


def body(w1_input: str = "normed", w2_input: str = "hidden", **names: str) -> list[onnx.NodeProto]:
    """LayerNormalization -> MatMul -> Relu -> MatMul."""
    return [
        node("LayerNormalization", ["x", "gamma", "beta"], ["normed"], name="norm"),
        node("MatMul", [w1_input, names.get("w1", "w1")], ["up"], name="fc1"),
        node("Relu", ["up"], ["hidden"], name="act"),
        node("MatMul", [w2_input, names.get("w2", "w2")], ["logits"], name="fc2"),
    ]


def float_model(path: Path, **shapes: Any) -> Path:
    """The reference."""
    return save(path, body(), weights(), **shapes)


def half_model(path: Path) -> Path:
    """The reference in float16, inputs and outputs too."""
    return save(path, body(), {n: v.astype(np.float16) for n, v in weights().items()}, elem=T.FLOAT16)


def folded_model(path: Path) -> Path:
    """The same function with scales 1..8 moved from the norm into w1."""
    w, r = weights(), np.arange(1, DIM + 1, dtype=np.float32)
    w |= {"gamma": w["gamma"] / r, "beta": w["beta"] / r, "w1": w["w1"] * r[:, None]}
    return save(path, body(), w)


def coarse_model(path: Path, tensor: str = "hidden", scale: float = 0.5) -> Path:
    """The reference with one tensor rounded to multiples of `scale` by an int8 Q/DQ pair."""
    w = weights() | {"s": np.float32(scale), "z": np.int8(0)}
    pair = [
        node("QuantizeLinear", [tensor, "s", "z"], ["q"], name="quantize"),
        node("DequantizeLinear", ["q", "s", "z"], ["dq"], name="dequantize"),
    ]
    nodes = body(**{"w2_input" if tensor == "hidden" else "w1_input": "dq"})
    at = next(i for i, n in enumerate(nodes) if tensor in n.output) + 1
    return save(path, [*nodes[:at], *pair, *nodes[at:]], w)


def dataset(path: Path, reference: Path, n: int = 20, labels: NDArray[Any] | None = None) -> Dataset:
    """`n` standard normal samples, and labels if given, through a `.npz` file."""
    arrays = {"x": np.random.default_rng(1).standard_normal((n, DIM)).astype(np.float32)}
    np.savez(path, **arrays, **({} if labels is None else {"labels": labels}))
    return load_data(str(path), Model.load(reference).inputs())
