"""What is asked of a tensor: extremes by channel only where every sample has the same channels."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from qcompile.calib.observe import AbsMax, MinMax
from qcompile.rewrite.half.types import probe


@pytest.mark.parametrize(
    ("shape", "observer"), [(["N", "L", 32], MinMax(-1)), (["N", "L", "L"], AbsMax()), ([1, 4, 7, 7], AbsMax())]
)
def test_channels_are_as_many_in_every_sample(shape: list[Any], observer: Any) -> None:
    value = ir.Value(name="v", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    assert probe(value).observer == observer
