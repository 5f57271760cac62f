from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from qcompile.ir.model import Model
from qcompile.ir.ops import static_shape
from qcompile.passes.forms.canonicalize.canonicalize import Canonicalize
from qcompile.passes.forms.pad_heads.pad_heads import PadHeads
from qcompile.passes.forms.pad_heads.weights import widened
from tests.passes.forms.small import assert_same, build, ops, random
from tests.passes.running import context

HEADS, TOKENS = 2, 5
Edit = Callable[[list[Any], dict[str, Any]], None]


def attention(q: int, v: int | None = None, target: tuple[int, ...] = (0, TOKENS, HEADS, -1), edit: Edit | None = None) -> Model:
    """Three projections, heads of `q` and `v` channels, an output projection."""
    v, node = v or q, helper.make_node
    constants: dict[str, Any] = {"scale": np.float32(q**-0.5), "merge": np.array([0, TOKENS, -1])}
    nodes: list[Any] = []
    for part, size in (("q", q), ("k", q), ("v", v)):
        constants |= {f"w{part}": random(16, HEADS * size) / 4, f"b{part}": random(HEADS * size), f"t{part}": np.array(target)}
        constants[f"t{part}"][3] = size if target[3] > 0 else -1
        nodes += [
            node("MatMul", ["x", f"w{part}"], [f"{part}0"], name=f"{part}_fc"),
            node("Add", [f"b{part}", f"{part}0"], [f"{part}1"], name=f"{part}_bias"),
            node("Reshape", [f"{part}1", f"t{part}"], [f"{part}2"], name=f"{part}_heads"),
            node("Transpose", [f"{part}2"], [part], name=f"{part}_t", perm=[0, 2, 3, 1] if part == "k" else [0, 2, 1, 3]),
        ]
    constants["wo"] = random(HEADS * v, 16) / 4
    nodes += [
        node("MatMul", ["q", "k"], ["s"], name="scores"),
        node("Mul", ["s", "scale"], ["ss"], name="scaled"),
        node("Softmax", ["ss"], ["p"], name="softmax", axis=-1),
        node("MatMul", ["p", "v"], ["o"], name="pv"),
        node("Transpose", ["o"], ["o1"], name="back", perm=[0, 2, 1, 3]),
        node("Reshape", ["o1", "merge"], ["o2"], name="join"),
        node("MatMul", ["o2", "wo"], ["y"], name="out"),
    ]
    if edit is not None:
        edit(nodes, constants)
    return build(nodes, ["N", TOKENS, 16], constants)


def pad(model: Model, **options: Any) -> tuple[Model, str]:
    """The padded model, and the remark."""
    after, ctx = model.clone(), context("rtx", **options)
    Canonicalize().apply(after, context("rtx"))
    PadHeads().apply(after, ctx)
    return after, next(r.reason for r in ctx.remarks.all)


def head_sizes(model: Model) -> list[int | None]:
    k, v = (static_shape(next(n for n in model.graph if n.name == name).inputs[1]) for name in ("scores", "pv"))
    assert k is not None and v is not None
    return [k[-2], v[-1]]


@pytest.mark.parametrize(("size", "wide"), [(8, 16), (12, 16), (24, 32), (40, 64), (48, 64)])
@pytest.mark.parametrize("target", [(0, TOKENS, HEADS, -1), (0, 0, HEADS, 1), (-1, TOKENS, HEADS, 1)])
def test_zeros_are_in_the_weights(size: int, wide: int, target: tuple[int, ...]) -> None:
    before = attention(size, target=target)
    after, remark = pad(before)
    assert head_sizes(after) == [wide, wide] and "in the weights" in remark
    assert ops(after) == ops(before)
    assert_same(before, after, random(3, TOKENS, 16))


@pytest.mark.parametrize("size", [16, 32, 64, 80, 96])
def test_heads_that_fuse_or_never_do_stay(size: int) -> None:
    after, remark = pad(attention(size))
    assert head_sizes(after) == [size, size] and remark == "no attention that padded heads would make one kernel"


def test_unlike_heads_become_alike() -> None:
    before = attention(16, 24)
    after, remark = pad(before)
    assert head_sizes(after) == [32, 32] and "16 (q, k) and 24 (v)" in remark
    assert_same(before, after, random(3, TOKENS, 16))


def add_norm(nodes: list[Any], constants: dict[str, Any]) -> None:
    """A norm of each head of q."""
    at = next(i for i, n in enumerate(nodes) if n.name == "q_t")
    nodes[at].output[0] = "q3"
    nodes.insert(at + 1, helper.make_node("LayerNormalization", ["q3", "g"], ["q"], name="norm", axis=-1))
    constants["g"] = random(24)


def read_sizes(nodes: list[Any], constants: dict[str, Any]) -> None:
    """The scale from the size of a head, as it is: padded heads would have another."""
    at = next(i for i, n in enumerate(nodes) if n.name == "scaled")
    nodes[at].input[1] = "root"
    constants |= {"last": np.array([-1]), "end": np.array([99])}
    nodes[at:at] = [
        helper.make_node("Shape", ["q"], ["sizes"], name="sizes"),
        helper.make_node("Slice", ["sizes", "last", "end"], ["size"], name="size"),
        helper.make_node("Cast", ["size"], ["number"], name="number", to=1),
        helper.make_node("Sqrt", ["number"], ["root"], name="root"),
    ]


def repeat_keys(nodes: list[Any], constants: dict[str, Any]) -> None:
    """One head of keys for both of the queries."""
    at = next(i for i, n in enumerate(nodes) if n.name == "k_t")
    nodes[at].output[0] = "k3"
    constants |= {"wk": random(16, 24), "bk": random(24), "tk": np.array([0, TOKENS, 1, 24]), "wide": np.array([1, HEADS, 1, 1])}
    nodes.insert(at + 1, helper.make_node("Expand", ["k3", "wide"], ["k"], name="repeat"))


@pytest.mark.parametrize("edit", [add_norm, read_sizes, repeat_keys])
def test_pads_where_the_heads_cannot_be_followed(edit: Edit) -> None:
    before = attention(24, edit=edit)
    after, remark = pad(before)
    if "Pad" in ops(after):
        assert ops(after).count("Pad") == 3 and ops(after).count("Slice") - ops(before).count("Slice") in (0, 1)
        assert "in front of its products" in remark
    assert head_sizes(after) == [32, 32]
    assert_same(before, after, random(3, TOKENS, 16))


def test_a_product_that_stays_float_keeps_its_heads() -> None:
    after, remark = pad(attention(24), keep_float=("pv",))
    assert head_sizes(after) == [24, 24] and "keep" in remark


def test_other_targets_have_no_preferred_size() -> None:
    after, ctx = attention(24), context("ort")
    assert not PadHeads().apply(after, ctx).modified


def test_zeros_stand_behind_each_head() -> None:
    assert widened(np.arange(1, 5).reshape(1, 4), 1, 2, 3).tolist() == [[1, 2, 0, 3, 4, 0]]
    assert widened(np.arange(1, 5).reshape(4, 1), 0, 2, 3)[:, 0].tolist() == [1, 2, 0, 3, 4, 0]


def test_quantized_operands_stay() -> None:
    def quantize(nodes: list[Any], constants: dict[str, Any]) -> None:
        at = next(i for i, n in enumerate(nodes) if n.name == "scores")
        nodes[at].input[0] = "qd"
        constants |= {"qs": np.float32(0.1), "qz": np.int8(0)}
        nodes[at:at] = [
            helper.make_node("QuantizeLinear", ["q", "qs", "qz"], ["qc"], name="Q"),
            helper.make_node("DequantizeLinear", ["qc", "qs", "qz"], ["qd"], name="DQ"),
        ]

    after, ctx = attention(24, edit=quantize), context("rtx")
    assert not PadHeads().apply(after, ctx).modified
    assert [r.reason for r in ctx.remarks.all] == ["its operands are quantized already"]


def names(model: Model) -> set[str]:
    return {str(v.name) for n in model.graph for v in n.outputs}


def test_tensors_of_another_shape_have_other_names() -> None:
    before = attention(24)
    after, _ = pad(before)
    kept = names(before) & names(after)
    shapes = {str(v.name): v.shape for n in before.graph for v in n.outputs}
    found = {str(v.name): v.shape for n in after.graph for v in n.outputs}
    assert {"s", "p", "y"} <= kept and all(isinstance(found[n], ir.Shape) and found[n] == shapes[n] for n in kept)
