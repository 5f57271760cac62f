from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qcompile.decide.decisions import decide, lines
from qcompile.decide.quantizer import Quantizer
from qcompile.ir.edit import add_constant
from qcompile.ir.model import Model
from qcompile.ir.text import print_model
from qcompile.quant.qtype import INT8
from qcompile.quant.spec import QParams, QuantSpec
from tests.ir import tiny

GOLDEN = """\
graph opset=17 (x: FLOAT[N,2]) -> (y: FLOAT[N,2])
  h = MatMul(x, const<float32[2, 2]: 1, 2, 3, 4>) @MatMul_0
      [out 0] int8 h:PerTensor()
      [in 0] int8 x:0.25:0 scale~0.25
  a = Relu(h) @Relu_1
  b = MatMul(a, const<float32[2, 2]: 1, 2, 3, 4>) @MatMul_2
  y = Add(b, const<float32[2]: 0.5, -0.5>) @Add_3
"""


def small() -> Model:
    proto = tiny.linear(2)
    weights = {"w": np.array([[1, 2], [3, 4]], np.float32), "bias": np.array([0.5, -0.5], np.float32)}
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    return Model.from_proto(proto)


def test_golden() -> None:
    model = small()
    decide(model.graph.node(0), ~0, Quantizer(QuantSpec(INT8)))
    decide(model.graph.node(0), 0, Quantizer(QuantSpec(INT8), QParams(np.array(0.25), np.array(0))))
    assert print_model(model, lines) == GOLDEN


def test_without_decisions() -> None:
    model = small()
    plain = print_model(model)
    decide(model.graph.node(0), 0, Quantizer(QuantSpec(INT8)))
    assert print_model(model) == plain != print_model(model, lines)


def test_stable_across_storage(tmp_path: Path) -> None:
    proto, copy = tiny.fixed_vit(), tiny.fixed_vit()
    texts = [print_model(Model.from_proto(proto))]
    onnx.save(copy, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    texts.append(print_model(Model.load(tmp_path / "m.onnx")))
    texts.append(print_model(Model.load(Model.from_proto(proto).save(tmp_path / "n.onnx"))))
    assert len(set(texts)) == 1


def test_large_constants_are_summarised() -> None:
    model = Model.from_proto(tiny.linear())
    w = model.graph.initializers["w"].const_value
    assert w is not None
    rms = np.sqrt((w.numpy().astype(np.float64) ** 2).mean())
    assert f"const<float32[4, 4]: min {w.numpy().min():.6g} max {w.numpy().max():.6g} rms {rms:.6g}>" in print_model(model)


def test_odd_constants_and_attributes_print() -> None:
    proto = tiny.branches()
    words = numpy_helper.from_array(np.array(["a"] * 20, dtype=object), "words")
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=words))
    proto.graph.node.insert(0, helper.make_node("Dropout", ["x"], ["d", ""]))
    model = Model.from_proto(proto)
    add_constant(model.graph, "unused", np.zeros((0, 3), np.float32))
    text = print_model(model)
    assert "string[20]" in text and "then_branch=graph" in text and "d, - = Dropout(x)" in text
