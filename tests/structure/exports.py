"""The exporter fixtures, loaded the way that matchers expect graphs: shapes inferred, shape vectors folded."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qcompile.ir.shape_fold import fold_shapes

FOLDER = Path(__file__).parents[1] / "fixtures" / "exports"
INDEX: dict[str, dict[str, Any]] = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))["fixtures"]


def load(name: str) -> ir.Model:
    """A fresh copy of the fixture after shape inference and shape folding."""
    return prepared(name).clone()


@cache
def prepared(name: str) -> ir.Model:
    """The one that `load` copies: do not edit."""
    model = ir.from_proto(onnx.load(FOLDER / INDEX[name]["file"]))
    ShapeInferencePass()(model)
    for _ in range(8):
        if not fold_shapes(model.graph):
            break
        ShapeInferencePass()(model)
    return model


def feeds(name: str, batch: int = 2) -> dict[str, np.ndarray]:
    """Random inputs."""
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for info in INDEX[name]["inputs"]:
        shape = [d if isinstance(d, int) else batch for d in info["shape"]]
        integer = info["dtype"].startswith("int")
        made[info["name"]] = (rng.integers(0, 2, shape) if integer else rng.standard_normal(shape)).astype(info["dtype"])
    return made
