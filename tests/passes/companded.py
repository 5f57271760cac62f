"""What the tests of companded codes and of split ranges share."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from qcompile.ir.model import Model
from qcompile.report import PassReport
from tests.passes.models import Feeds, built


@cache
def points() -> NDArray[np.float32]:
    rng = np.random.default_rng(1)
    spread = np.concatenate([rng.uniform(-0.2, 1, 50_000), 2.0 ** rng.uniform(-24, 0, 50_000), [0.0, 1.0]])
    return spread.astype(np.float32).reshape(-1, 2)


def arrays() -> Feeds:
    return {"x": np.random.default_rng(0).standard_normal((8, 5, 16)).astype(np.float32)}


def said(reports: list[PassReport], name: str) -> list[tuple[str, str | None, str]]:
    return [(r.kind, r.node, r.reason) for x in reports for r in x.remarks if r.pass_name == name]


def relu_block() -> Model:
    """Two products with Relu between."""
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((16, 16)).astype(np.float32) for n in ("w1", "w2")}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="fc1"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "w2"], ["y"], name="fc2"),
    ]
    return built(nodes, ["N", 5, 16], weights)
