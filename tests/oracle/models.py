"""Two tiny float models that use every part of the integer target, compiled for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

import qcompile
from tests.oracle.random_floats import attend, finish, head, normalize, seeded

SEED = 11


def tiny_cnn() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """conv, residual, pooling, concat, a table, global average, dense."""
    g = seeded(SEED)
    g.shapes["x"] = (2, 7, 6)
    w = [g.constant(g.rng.standard_normal(s).astype(np.float32)) for s in ((4, 2, 3, 3), (4, 1, 3, 3))]
    first = g.add("Relu", [g.add("Conv", ["x", w[0], g.constant(g.bias(4))], (4, 7, 6), pads=[1] * 4)], (4, 7, 6))
    second = g.add("Conv", [first, w[1]], (4, 7, 6), pads=[1] * 4, group=4)
    joined = g.add("Add", [first, g.add("Sigmoid", [second], (4, 7, 6))], (4, 7, 6))
    pooled = g.add("MaxPool", [joined], (4, 3, 3), kernel_shape=[2, 2], strides=[2, 2])
    both = g.add(
        "Concat", [pooled, g.add("AveragePool", [joined], (4, 3, 3), kernel_shape=[3, 2], strides=[2, 2])], (8, 3, 3), axis=1
    )
    out = head(g, both)
    return finish(g, [out]), {"x": g.rng.standard_normal((12, 2, 7, 6)).astype(np.float32)}


def tiny_attention() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """LayerNorm, attention with softmax, GELU, residuals."""
    g = seeded(SEED + 1)
    g.shapes["x"] = (5, 8)
    mixed = attend(g, normalize(g, "x"))
    summed = g.add("Add", ["x", mixed], (5, 8))
    weight, back = (g.constant(g.rng.standard_normal(s).astype(np.float32) / 3) for s in ((8, 12), (12, 8)))
    hidden = g.add("Add", [g.add("MatMul", [normalize(g, summed), weight], (5, 12)), g.constant(g.bias(12))], (5, 12))
    part = g.add("Erf", [g.add("Div", [hidden, g.constant(np.float32(2**0.5))], (5, 12))], (5, 12))
    doubled = g.add("Mul", [hidden, g.add("Add", [part, g.constant(np.float32(1))], (5, 12))], (5, 12))
    gelu = g.add("Mul", [doubled, g.constant(np.float32(0.5))], (5, 12))
    out = g.add("Add", [summed, g.add("MatMul", [gelu, back], (5, 8))], (5, 8))
    return finish(g, [out]), {"x": g.rng.standard_normal((12, 5, 8)).astype(np.float32)}


MODELS = {"cnn": tiny_cnn, "attention": tiny_attention}


def compiled(name: str, folder: Path, **options: Any) -> tuple[Path, dict[str, np.ndarray]]:
    """The integer-only file of a model, and its data."""
    model, data = MODELS[name]()
    onnx.save(model, folder / f"{name}.onnx")
    np.savez(folder / f"{name}.calib.npz", **data)  # pyright: ignore[reportArgumentType]
    target = folder / f"{name}.integer.onnx"
    qcompile.compile(folder / f"{name}.onnx", output=target, target="integer", threads=1, **options)
    return target, data
