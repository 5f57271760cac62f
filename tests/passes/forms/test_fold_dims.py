from __future__ import annotations

import numpy as np
import pytest

from qcompile.pipeline import registry
from tests.passes.measures import op_types, outputs
from tests.passes.models import Feeds
from tests.passes.running import Step, context, step
from tests.passes.text import read_model

SCALED = """\
graph opset=17 (x: FLOAT[N,{rows},{width}]) -> (y: FLOAT[N,{rows},{width}])
  s = Shape(x) @shape
  c = Slice(s, const<int64[1]: {axis}>, const<int64[1]: {end}>) @part
  f = Cast(c) {{to=1}} @cast
  r = Sqrt(f) @root
  y = Div(x, r) @scale
"""


def folded(axis: int, rows: int | str = 5, width: int | str = 16) -> tuple[Step, Feeds]:
    text = SCALED.format(axis=axis, end=2**31 - 1 if axis == -1 else axis + 1, rows=rows, width=width)
    arrays = {"x": np.random.default_rng(0).standard_normal((4, 5, 16)).astype(np.float32)}
    return step(registry.parse("fold-dims")[0], read_model(text).model, arrays, context("integer")), arrays


@pytest.mark.parametrize(("axis", "size"), [(-1, 16), (1, 5)])
def test_a_size_that_is_known_becomes_a_constant(axis: int, size: int) -> None:
    done, arrays = folded(axis)
    assert done.changed and op_types(done.after) == ["Div"]
    assert np.array_equal(outputs(done.before, arrays)[0], outputs(done.after, arrays)[0])
    np.testing.assert_allclose(outputs(done.after, arrays)[0], arrays["x"] / np.sqrt(size), rtol=1e-6)


@pytest.mark.parametrize(("axis", "rows", "width"), [(0, 5, 16), (1, "T", 16), (-1, 5, "C")])
def test_a_size_that_changes_from_run_to_run_stays(axis: int, rows: int | str, width: int | str) -> None:
    done, _ = folded(axis, rows, width)
    assert not done.changed and "Shape" in op_types(done.after)
