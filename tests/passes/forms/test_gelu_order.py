from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from qcompile.ir.model import Model
from qcompile.passes.forms.gelu_order import GeluOrder
from tests.passes.forms.small import apply, assert_same, build, random, run

node = helper.make_node


def gelu(other: str = "x") -> Model:
    nodes = [
        node("Div", ["x", "root"], ["d"], name="div"),
        node("Erf", ["d"], ["e"], name="erf"),
        node("Add", ["e", "one"], ["a"], name="add"),
        node("Mul", ["half", "a"], ["h"], name="half_mul"),
        node("Mul", [other, "h"], ["y"], name="gelu"),
    ]
    constants = {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5), "k": random(8)}
    return build(nodes, [2, 8], constants)


def test_gelu_is_put_into_the_order_that_is_fused(tmp_path: Path) -> None:
    before, x = gelu(), random(2, 8)
    after, modified, _ = apply(GeluOrder(), before)
    assert modified and apply(GeluOrder(), after)[1] is False
    assert_same(before, after, x)
    run(after, x, optimize=True, save=tmp_path / "o.onnx")
    assert [n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node] == ["Gelu"]


def test_a_product_that_is_no_gelu_stays() -> None:
    assert not apply(GeluOrder(), gelu("k"))[1]
