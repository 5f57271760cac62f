"""Small models for the forms that ONNX Runtime wants, and what its kernels make of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from qcompile.execute.session import session_options
from qcompile.ir.model import Model
from qcompile.pipeline.base import Pass, PassContext
from qcompile.quant.spec import SCHEMES
from qcompile.target.catalog import TARGETS

RNG = np.random.default_rng(0)


def build(nodes: list[onnx.NodeProto], shape: Sequence[Any], constants: dict[str, NDArray[Any]], elem: int = T.FLOAT) -> Model:
    x, y = helper.make_tensor_value_info("x", elem, shape), helper.make_tensor_value_info("y", elem, None)
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return Model.from_proto(onnx.shape_inference.infer_shapes(made))


def random(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def run(model: Model, x: NDArray[Any], optimize: bool = False, save: Path | None = None) -> NDArray[Any]:
    options = session_options(optimize="all" if optimize else "off")
    if save is not None:
        options.optimized_model_filepath = str(save)
    session = ort.InferenceSession(model.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def apply(rewrite: Pass, model: Model) -> tuple[Model, bool, list[str]]:
    """The rewritten copy, whether it changed, and the kinds of its remarks."""
    after, ctx = model.clone(), PassContext(SCHEMES["w8a8"], TARGETS["ort"])
    return after, rewrite.apply(after, ctx).modified, [r.kind for r in ctx.remarks.all]


def assert_same(before: Model, after: Model, x: NDArray[Any]) -> None:
    a, b = run(before, x), run(after, x)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= 5e-6 * np.abs(a).max()


def ops(model: Model) -> list[str]:
    return [n.op_type for n in model.graph]
