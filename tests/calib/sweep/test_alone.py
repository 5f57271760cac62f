"""Models that take one sample a run although their batch axis is dynamic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from qcompile.calib.sweep.alone import suited
from qcompile.ir.model import Model
from tests.passes.models import built
from tests.passes.running import dataset

W = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
DATA = {"x": np.random.default_rng(1).standard_normal((6, 3, 4)).astype(np.float32)}


def model(*shape: int) -> Model:
    nodes = [helper.make_node("Reshape", ["x", "to"], ["r"]), helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1])]
    nodes += [helper.make_node("MatMul", ["r", "t"], ["s"]), helper.make_node("MatMul", ["s", "r"], ["y"])]
    return built(nodes, ["N", 3, 4], {"to": np.array(shape)})


def joined(axis: int, *shape: int) -> Model:
    nodes = [helper.make_node("Concat", ["x", "token"], ["y"], axis=axis)]
    return built(nodes, ["N", 3, 4], {"token": np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    ("made", "alone"),
    [
        (lambda: model(1, 3, 4), True),  # an error
        (lambda: model(1, -1, 4), True),  # both samples in one sequence
        (lambda: model(-1, 3, 4), False),
        (lambda: joined(1, 1, 1, 4), True),  # an error
        (lambda: joined(0, 1, 3, 4), True),  # a row for all samples
    ],
)
def test_frozen_batches_are_found(made: Any, alone: bool) -> None:
    assert suited(dataset(DATA), made()).alone is alone
