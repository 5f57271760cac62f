from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from qcompile.ir.model import Model
from qcompile.passes.forms.fold_pad import FoldPad
from tests.passes.forms.small import apply, assert_same, build, ops, random

node = helper.make_node


def padded(amounts: list[int], value: float = 0.0, **attributes: Any) -> Model:
    pad = node("Pad", ["x", "p", "v"], ["wide"], name="pad", **attributes)
    conv = node("Conv", ["wide", "w"], ["y"], name="conv", pads=[1, 0, 0, 1])
    return build([pad, conv], [1, 2, 9, 9], {"p": np.array(amounts), "v": np.float32(value), "w": random(4, 2, 3, 3)})


def test_pad_goes_into_the_convolution() -> None:
    before = padded([0, 0, 1, 2, 0, 0, 3, 4])
    after, modified, _ = apply(FoldPad(), before)
    assert modified and ops(after) == ["Conv"]
    assert_same(before, after, random(1, 2, 9, 9))


@pytest.mark.parametrize(
    "model",
    [padded([0, 0, 1, 1, 0, 0, 1, 1], 2.0), padded([0, 0, 1, 1, 0, 0, -1, 1]), padded([0, 0, 1, 1, 0, 0, 1, 1], mode="reflect")],
    ids=["not zero", "crop", "reflect"],
)
def test_other_pads_stay(model: Model) -> None:
    _, modified, kinds = apply(FoldPad(), model)
    assert not modified and kinds == ["missed"]
