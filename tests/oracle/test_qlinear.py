"""QLinearConv and QLinearMatMul: the oracle's float32 rescaling is ONNX Runtime's, bit for bit; what guards them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qcompile.errors import ModelError
from qcompile.execute.session import make_session
from qcompile.oracle.export import export_document
from qcompile.oracle.qlinear import SCALES, SUMS
from qcompile.oracle.ranges import prove
from qcompile.oracle.run import run_integer
from qcompile.target.check import check
from qcompile.verbs.evaluate.conformance import conformance
from tests.oracle.build import SETTINGS, model_of, node
from tests.oracle.models import compiled
from tests.passes.running import dataset

Array = NDArray[Any]
SEEDS = range(24)


def scales(rng: np.random.Generator, shape: tuple[int, ...] = ()) -> Array:
    return np.asarray(rng.uniform(0.001, 0.1, shape), np.float32)


def spread(rng: np.random.Generator, length: int, first: Array, second: Array) -> Array:
    """An output scale under which some codes saturate and most do not."""
    return np.asarray(first * second.mean() * np.sqrt(length) * 74 * 74 / rng.choice([5, 64]), np.float32)


def code(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(-128, 128, shape).astype(np.int8)


def conv(seed: int) -> tuple[onnx.ModelProto, dict[str, Array]]:
    rng = np.random.default_rng(seed)
    channels, made, k = int(rng.integers(1, 40)), int(rng.integers(1, 40)), int(rng.choice([1, 3, 5]))
    groups = channels if seed % 3 == 0 else 1
    w = code(rng, made if groups == 1 else channels, channels // groups, k, k)
    s, sw = scales(rng), scales(rng, (len(w),))
    constants = {
        "s": s, "z": code(rng)[()], "w": w, "sw": sw, "zw": np.zeros(len(w), np.int8),
        "so": spread(rng, w[0].size, s, sw), "zo": code(rng)[()], "b": rng.integers(-20000, 20000, len(w)).astype(np.int32),
    }  # fmt: skip
    names = ["x", "s", "z", "w", "sw", "zw", "so", "zo", *(["b"] if seed % 4 else [])]
    x = {"x": code(rng, 3, channels, 7, 6)}
    constants = {name: array for name, array in constants.items() if name in names}
    return model_of([node("QLinearConv", names, "y", group=groups, pads=[k // 2] * 4)], x, ["y"], constants), x


def matmul(seed: int) -> tuple[onnx.ModelProto, dict[str, Array]]:
    rng = np.random.default_rng(seed)
    rows, length, columns = (int(n) for n in rng.integers(1, 80, 3))
    constant, by_column = seed % 2 == 1, seed % 4 == 1
    b = code(rng, length, columns) if constant else code(rng, 2, length, columns)
    s, sb = scales(rng), scales(rng, (columns,) if by_column else ())
    constants = {
        "s": s, "z": code(rng)[()], "sb": sb, "zb": np.zeros(columns, np.int8) if by_column else code(rng)[()],
        "so": spread(rng, length, s, sb), "zo": code(rng)[()],
    }  # fmt: skip
    inputs = {"x": code(rng, 2, rows, length)} | ({} if constant else {"b": b})
    names = ["x", "s", "z", "b", "sb", "zb", "so", "zo"]
    return model_of([node("QLinearMatMul", names, "y")], inputs, ["y"], constants | ({"b": b} if constant else {})), inputs


@pytest.mark.parametrize("make", [conv, matmul])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_oracle_rescales_as_onnx_runtime_does(make: Any, seed: int) -> None:
    model, feeds = make(seed)
    ours, data = run_integer(model, feeds)["y"], model.SerializeToString()
    for optimize, threads in SETTINGS:
        session = make_session(data, optimize=optimize, threads=threads, use=["CPUExecutionProvider"])
        assert np.array_equal(ours, session.run(None, feeds)[0])  # pyright: ignore[reportArgumentType]


# ---- what guards them ---------------------------------------------------------------------------------------------


def test_the_sums_inside_are_bounded() -> None:
    model, _ = conv(1)
    proof = prove(model)
    inner, outer = proof.bounds
    assert proof.complete and (inner.op, inner.dtype, outer.op, outer.dtype) == ("ConvInteger", "int32", "QLinearConv", "int8")
    assert proof.worst == inner and inner.hi > 127


def test_a_sum_that_leaves_int32_with_its_bias_is_an_error() -> None:
    model, _ = conv(1)
    bias = next(t for t in model.graph.initializer if t.name == "b")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(bias.dims, 2**31 - 1, np.int32), "b"))
    assert [(p.kind, p.node) for p in prove(model).problems] == [("overflow32", "y_node")]


def test_only_the_profile_allows_them(tmp_path: Path) -> None:
    path, _ = compiled("cnn", tmp_path, passes="integer{profile=ort-fused}")
    model = onnx.load(path)
    assert not [f for f in check(model, "integer") if f.severity == "error"]
    for p in model.metadata_props:
        p.value = "strict" if p.key == "qcompile.integer" else p.value
    refused = [f for f in check(model, "integer") if f.rule == "QC-INT-002"]
    assert refused and "only the profile ort-fused" in refused[0].message


def test_a_computed_scale_is_an_error(tmp_path: Path) -> None:
    path, _ = compiled("cnn", tmp_path, passes="integer{profile=ort-fused}")
    model = onnx.load(path)
    fused = next(n for n in model.graph.node if n.op_type == "QLinearConv")
    model.graph.node.insert(0, helper.make_node("Identity", [fused.input[1]], ["again"], name="again"))
    fused.input[1] = "again"
    assert {(f.rule, f.node) for f in check(model, "integer") if f.severity == "error"} == {("QC-INT-001", "again")}


def test_a_fused_model_is_bit_exact_and_near_the_strict_one(tmp_path: Path) -> None:
    path, data = compiled("cnn", tmp_path)
    strict = path.read_bytes()
    fused, _ = compiled("cnn", tmp_path, passes="integer{profile=ort-fused}")
    model = onnx.load(fused)
    assert {n.op_type for n in model.graph.node} >= {"QLinearConv"}
    assert {p.key: p.value for p in model.metadata_props}["qcompile.integer"] == "ort-fused"
    floats = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    reads = [(n.op_type, i) for n in model.graph.node for i, x in enumerate(n.input) if x in floats]
    assert all(i in SCALES if op in SUMS else i == 1 for op, i in reads)
    found = conformance(fused, dataset(data))
    assert found.mismatches == 0 and found.matches > 0
    a, b = (np.asarray(make_session(p, optimize="all").run(None, data)[0]) for p in (strict, fused))  # pyright: ignore[reportArgumentType]
    assert np.abs(a - b).max() <= 0.02 * np.abs(a).max()


def test_a_fused_model_is_not_exported(tmp_path: Path) -> None:
    path, _ = compiled("cnn", tmp_path, passes="integer{profile=ort-fused}")
    with pytest.raises(ModelError, match=r"rescales in float; compile it with integer\{profile=strict\}"):
        export_document(onnx.load(path))
