"""One operator at a time: (name, node, inputs, constants), over the operators that integer-only graphs may hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, numpy_helper

from tests.oracle.build import node

Array = NDArray[Any]
RNG = np.random.default_rng(7)
SAFE = 128  # uint8 below it cannot saturate with int8 on hosts without VNNI (QC-INT-014)


@dataclass(frozen=True)
class Case:
    """A node on random integers; `reference` is False where onnx.reference lacks the operator on this type, or is wrong."""

    name: str
    node: NodeProto
    inputs: dict[str, Array]
    constants: dict[str, Array] = field(default_factory=dict)
    reference: bool = True


def ints(dtype: Any, *shape: int, low: int = -100, high: int = 100) -> Array:
    return RNG.integers(low, high, shape).astype(dtype)


def small(*shape: int) -> Array:
    return RNG.integers(-128, 128, shape).astype(np.int8)


def unsigned(*shape: int, high: int = 256) -> Array:
    return RNG.integers(0, high, shape).astype(np.uint8)


def _arithmetic() -> Iterator[Case]:
    for dtype in (np.int32, np.int64):
        kind = np.dtype(dtype).name
        a, b = ints(dtype, 2, 3, 4), ints(dtype, 3, 1)
        b[b == 0] = -7
        for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Mod"):
            yield Case(f"{op} {kind}", node(op, ["a", "b"], "y"), {"a": a, "b": b})
        yield Case(f"Mod truncated {kind}", node("Mod", ["a", "b"], "y", fmod=1), {"a": a, "b": b})
        for op in ("Neg", "Abs", "Sign"):
            yield Case(f"{op} {kind}", node(op, ["a"], "y"), {"a": a})
        for op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"):
            yield Case(f"{op} {kind}", node(op, ["a", "b"], "y"), {"a": a, "b": b})
        ends = {"low": np.asarray(-20, dtype), "high": np.asarray(30, dtype)}
        yield Case(f"Clip {kind}", node("Clip", ["a", "low", "high"], "y"), {"a": a}, ends)
        yield Case(f"Clip one end {kind}", node("Clip", ["a", "", "high"], "y"), {"a": a}, {"high": ends["high"]})
        pick = {"c": a > 0, "a": a, "b": b}
        yield Case(f"Where {kind}", node("Where", ["c", "a", "b"], "y"), pick)
    yield Case("Max of three", node("Max", ["a", "b", "c"], "y"), {k: ints(np.int64, 5) for k in "abc"})
    yield Case("Relu int32", node("Relu", ["a"], "y"), {"a": ints(np.int32, 9)})


def wide(n: int) -> Array:
    """int64 of every magnitude below 2^61, near ones among them."""
    near = RNG.integers(0, 1 << 33, n)
    return (RNG.integers(0, 1 << 61, n) >> RNG.integers(0, 60, n)) * RNG.choice([-1, 1], n) + near


def _wide() -> Iterator[Case]:
    """What lowered graphs do with int64 beyond 2^31; Clip, Max and Min are right on uint64 only."""
    a, b = wide(2000), wide(2000)
    b[b == 0] = 3
    for op in ("Add", "Sub", "Div", "Mod", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"):
        yield Case(f"{op} wide", node(op, ["a", "b"], "y"), {"a": a, "b": b})
    yield Case("Mul wide", node("Mul", ["a", "b"], "y"), {"a": a >> 32, "b": b >> 31})
    for op in ("Max", "Min"):
        yield Case(
            f"{op} uint64", node(op, ["a", "b"], "y"), {"a": np.abs(a).astype(np.uint64), "b": np.abs(b).astype(np.uint64)}
        )
    ends = {"low": np.asarray(1, np.uint64), "high": np.asarray(3037000499, np.uint64)}
    yield Case("Clip uint64", node("Clip", ["a", "low", "high"], "y"), {"a": np.abs(a).astype(np.uint64)}, ends)
    yield Case("Where wide", node("Where", ["c", "a", "b"], "y"), {"c": a > b, "a": a, "b": b})


def _bits() -> Iterator[Case]:
    a = RNG.integers(0, 1 << 62, (4, 3)).astype(np.uint64)
    e = np.array([1, 31, 61], np.uint64)
    yield Case("BitShift right", node("BitShift", ["a", "e"], "y", direction="RIGHT"), {"a": a, "e": e})
    yield Case("BitShift left", node("BitShift", ["a", "e"], "y", direction="LEFT"), {"a": a >> np.uint64(61), "e": e})
    p, q = ints(np.int32, 6) > 0, ints(np.int32, 6) > 0
    for op in ("And", "Or", "Xor"):
        yield Case(op, node(op, ["p", "q"], "y"), {"p": p, "q": q})
        yield Case(f"Bitwise{op}", node(f"Bitwise{op}", ["a", "b"], "y"), {"a": ints(np.int64, 6), "b": ints(np.int64, 6)})
    yield Case("Not", node("Not", ["p"], "y"), {"p": p})
    casts = [
        (np.int64, TensorProto.INT8),
        (np.int8, TensorProto.INT64),
        (np.int64, TensorProto.UINT64),
        (np.int64, TensorProto.BOOL),
    ]
    for dtype, to in casts:
        x = ints(dtype, 20, low=-128 if dtype is np.int8 else -400, high=127 if dtype is np.int8 else 400)
        yield Case(f"Cast {np.dtype(dtype).name} to {to}", node("Cast", ["x"], "y", to=to), {"x": x})
    yield Case("Cast uint64 to int64", node("Cast", ["a"], "y", to=TensorProto.INT64), {"a": a})


def _movement() -> Iterator[Case]:
    x = small(2, 3, 4, 6)
    many = {
        name: np.asarray(v, np.int64)
        for name, v in {"s": [0, -1, 6], "a": [2], "b": [-1], "e": [5, 1], "z": [1, 0, 3, 0]}.items()
    }
    yield Case("Reshape", node("Reshape", ["x", "s"], "y"), {"x": x}, {"s": many["s"]})
    yield Case("Flatten", node("Flatten", ["x"], "y", axis=2), {"x": x})
    yield Case("Transpose", node("Transpose", ["x"], "y", perm=[0, 2, 3, 1]), {"x": x})
    yield Case("Concat", node("Concat", ["x", "w"], "y", axis=1), {"x": x, "w": small(2, 1, 4, 6)})
    ends = {"s": np.array([1, -1]), "e": np.array([4, -9]), "a": np.array([2, 3]), "t": np.array([2, -1])}
    yield Case("Slice", node("Slice", ["x", "s", "e", "a", "t"], "y"), {"x": x}, ends)
    yield Case("Split sizes", node("Split", ["x", "s"], ["y", "z"], axis=3), {"x": x}, {"s": np.array([2, 4])})
    yield Case("Split parts", node("Split", ["x"], ["y", "z"], axis=3, num_outputs=2), {"x": x})
    yield Case("Unsqueeze", node("Unsqueeze", ["x", "a"], "y"), {"x": x}, {"a": np.array([0, -1])})
    yield Case("Squeeze", node("Squeeze", ["x", "a"], "y"), {"x": small(2, 1, 4)}, {"a": np.array([1])})
    yield Case("Expand", node("Expand", ["x", "s"], "y"), {"x": small(3, 1)}, {"s": np.array([2, 1, 4])})
    yield Case("Tile", node("Tile", ["x", "r"], "y"), {"x": small(2, 3)}, {"r": np.array([2, 3])})
    pads = {"p": np.array([0, 0, 1, 2, 0, 0, 3, 0]), "v": np.asarray(-5, np.int8)}
    yield Case("Pad", node("Pad", ["x", "p", "v"], "y"), {"x": x}, pads)
    yield Case("Pad edge", node("Pad", ["x", "p"], "y", mode="edge"), {"x": x}, {"p": pads["p"]})
    indices = RNG.integers(-256, 256, (2, 5))
    yield Case("Gather", node("Gather", ["t", "i"], "y"), {"i": indices}, {"t": small(256)})
    yield Case("Gather axis", node("Gather", ["x", "i"], "y", axis=1), {"x": x}, {"i": np.array([2, 0, -1])})
    picks = RNG.integers(-4, 4, (2, 3, 5, 6))
    yield Case("GatherElements", node("GatherElements", ["x", "i"], "y", axis=2), {"x": x}, {"i": picks})
    part = node("GatherElements", ["x", "i"], "y", axis=-2)
    yield Case("GatherElements part", part, {"x": x}, {"i": picks[:1, :2, :, 1:]}, reference=False)
    yield Case("DepthToSpace", node("DepthToSpace", ["x"], "y", blocksize=2), {"x": small(1, 8, 2, 3)})
    yield Case("DepthToSpace CRD", node("DepthToSpace", ["x"], "y", blocksize=2, mode="CRD"), {"x": small(1, 8, 2, 3)})
    yield Case("Shape", node("Shape", ["x"], "y", start=1), {"x": x})
    fill = numpy_helper.from_array(np.array([7]))
    yield Case("ConstantOfShape", node("ConstantOfShape", ["x"], "y", value=fill), {"x": np.array([2, 3])})
    yield Case("Range", node("Range", ["a", "b", "c"], "y"), {k: np.asarray(v) for k, v in {"a": 2, "b": 9, "c": 3}.items()})
    floor = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    yield Case("Resize sizes", node("Resize", ["x", "", "", "s"], "y", **floor), {"x": x}, {"s": np.array([2, 3, 8, 18])})
    yield Case("Resize scales", node("Resize", ["x", "", "s"], "y"), {"x": x}, {"s": np.array([1, 1, 2, 3], np.float32)})


def _reductions() -> Iterator[Case]:
    for dtype in (np.int32, np.int64):
        x = ints(dtype, 2, 3, 4)
        axes = {"a": np.array([-1, 1])}
        for op in ("ReduceSum", "ReduceMax", "ReduceMin"):
            yield Case(f"{op} {x.dtype}", node(op, ["x", "a"], "y"), {"x": x}, axes)
            yield Case(f"{op} drop {x.dtype}", node(op, ["x", "a"], "y", keepdims=0), {"x": x}, axes)
            yield Case(f"{op} all {x.dtype}", node(op, ["x"], "y"), {"x": x})
    yield Case("ReduceMax int8", node("ReduceMax", ["x", "a"], "y"), {"x": small(3, 5)}, {"a": np.array([1])})


def _products() -> Iterator[Case]:
    a, b = small(2, 5, 7), small(2, 7, 3)
    yield Case("MatMulInteger", node("MatMulInteger", ["a", "b"], "y"), {"a": a, "b": b})
    zeros = {"az": np.asarray(3, np.uint8), "bz": np.array([1, -2, 5], np.int8)}
    yield Case(
        "MatMulInteger u8 s8",
        node("MatMulInteger", ["a", "b", "az"], "y"),
        {"a": unsigned(4, 7, high=SAFE), "b": small(7, 3)},
        {"az": zeros["az"]},
    )
    columns = node("MatMulInteger", ["a", "b", "az", "bz"], "y")
    yield Case("MatMulInteger per column", columns, {"a": unsigned(4, 7, high=SAFE), "b": small(7, 3)}, zeros)
    yield Case("MatMulInteger broadcast", node("MatMulInteger", ["a", "b"], "y"), {"a": small(2, 3, 4, 5), "b": small(5, 6)})
    for dtype in (np.int32, np.int64):
        yield Case(
            f"MatMul {np.dtype(dtype).name}", node("MatMul", ["a", "b"], "y"), {"a": a.astype(dtype), "b": b.astype(dtype)}
        )


def _convolutions() -> Iterator[Case]:
    x, w = small(2, 4, 7, 8), small(6, 4, 3, 3)
    forms: dict[str, dict[str, Any]] = {
        "plain": {},
        "pads": {"pads": [1, 0, 2, 1]},
        "strides": {"strides": [2, 3], "pads": [1, 1, 1, 1]},
        "dilations": {"dilations": [2, 1]},
        "same": {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    }
    for name, attributes in forms.items():
        yield Case(f"ConvInteger {name}", node("ConvInteger", ["x", "w"], "y", **attributes), {"x": x}, {"w": w}, name != "same")
    zero = {"w": w, "xz": np.asarray(-9, np.int8)}
    padded = node("ConvInteger", ["x", "w", "xz"], "y", pads=[1, 1, 1, 1])
    yield Case("ConvInteger zero point padding", padded, {"x": x}, zero)
    yield Case("ConvInteger u8", padded, {"x": unsigned(2, 4, 7, 8)}, {"w": w, "xz": np.asarray(131, np.uint8)})
    yield Case(
        "ConvInteger depthwise",
        node("ConvInteger", ["x", "w"], "y", group=4, pads=[1] * 4),
        {"x": x},
        {"w": small(8, 1, 3, 3)},
        False,
    )
    yield Case("ConvInteger 1d", node("ConvInteger", ["x", "w"], "y", pads=[1, 1]), {"x": small(2, 3, 9)}, {"w": small(4, 3, 3)})


def _pooling() -> Iterator[Case]:
    x = small(2, 3, 7, 9)
    forms: dict[str, dict[str, Any]] = {
        "plain": {"strides": [2, 2]},
        "pads": {"pads": [1, 1, 1, 1]},
        "ceil": {"strides": [2, 2], "ceil_mode": 1},
        "ceil pads": {"strides": [3, 2], "ceil_mode": 1, "pads": [0, 1, 1, 0]},
        "dilations": {"dilations": [2, 1]},
    }
    for name, attributes in forms.items():
        yield Case(f"MaxPool {name}", node("MaxPool", ["x"], "y", kernel_shape=[3, 2], **attributes), {"x": x}, reference=False)


CASES = [
    *_arithmetic(),
    *_wide(),
    *_bits(),
    *_movement(),
    *_reductions(),
    *_products(),
    *_convolutions(),
    *_pooling(),
]
