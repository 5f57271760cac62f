"""Small UNet-like graphs: channels of unlike ranges joined by a Concat."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import helper

from qcompile.ir.model import Model
from tests.passes.models import built

node = helper.make_node
SHAPE = (3, 12, 12)


def _weights(**shapes: tuple[int, ...]) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {n: (rng.standard_normal(s) / np.sqrt(max(1, np.prod(s[1:])))).astype(np.float32) for n, s in shapes.items()}


def joined(factor: float = 20.0, groups: int = 1, sizes: tuple[int, int] = (8, 4), pads: tuple[int, ...] = (1, 0, 0, 1)) -> Model:
    """Two convolutions, the second `factor` times as large -> Concat -> Conv with a bias."""
    a, b = sizes
    weights = _weights(wa=(a, 3, 3, 3), wb=(b, 3, 3, 3), w=(12, (a + b) // groups, 2, 2), c=(12,))
    weights["wb"] *= factor
    weights["w"][:, a:] /= factor
    nodes = [
        node("Conv", ["x", "wa"], ["a"], name="left", pads=[1, 1, 1, 1]),
        node("Conv", ["x", "wb"], ["b"], name="right", pads=[1, 1, 1, 1]),
        node("Concat", ["a", "b"], ["j"], name="join", axis=1),
        node("Conv", ["j", "w", "c"], ["y"], name="conv", pads=list(pads), group=groups),
    ]
    return built(nodes, ["N", *SHAPE], weights)


def nested() -> Model:
    """Concat(Concat(a, b), c) read by a 1x1 Conv, and by Relu -> Conv."""
    weights = _weights(wa=(4, 3, 1, 1), wb=(4, 3, 1, 1), wc=(4, 3, 1, 1), w=(6, 12, 1, 1), v=(6, 12, 3, 3), e=(6,))
    weights["wb"] *= 15
    nodes = [
        node("Conv", ["x", "wa"], ["a"], name="first"),
        node("Conv", ["x", "wb"], ["b"], name="second"),
        node("Conv", ["x", "wc"], ["c"], name="third"),
        node("Concat", ["a", "b"], ["ab"], name="inner", axis=1),
        node("Concat", ["ab", "c"], ["abc"], name="outer", axis=1),
        node("Conv", ["abc", "w"], ["s"], name="skip"),
        node("Relu", ["abc"], ["r"], name="relu"),
        node("Conv", ["r", "v", "e"], ["t"], name="body", pads=[1, 1, 1, 1]),
        node("Add", ["s", "t"], ["y"], name="sum"),
    ]
    return built(nodes, ["N", *SHAPE], weights)


def tokens() -> Model:
    """Concat on the last axis -> MatMul + Add."""
    weights = _weights(wa=(12, 8), wb=(12, 4), w=(12, 6), c=(6,))
    weights["wb"] *= 20
    nodes = [
        node("MatMul", ["x", "wa"], ["a"], name="left"),
        node("MatMul", ["x", "wb"], ["b"], name="right"),
        node("Concat", ["a", "b"], ["j"], name="join", axis=-1),
        node("MatMul", ["j", "w"], ["m"], name="fc"),
        node("Add", ["m", "c"], ["y"], name="bias"),
    ]
    return built(nodes, ["N", *SHAPE], weights)
