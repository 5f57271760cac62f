"""Which inputs are masks, and what is measured where their infinities arrive."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.calib.data.dataset import Dataset
from qcompile.calib.data.readers import ArrayReader
from qcompile.calib.observe import AbsMax, MinMax, Probe
from qcompile.calib.sweep.sweep import sweep
from qcompile.ir.model import Model

W = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)


def model(last: str = "Softmax") -> Model:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["s"]),
        helper.make_node("Unsqueeze", ["m", "axis"], ["wide"]),
        helper.make_node("Add", ["s", "wide"], ["sm"]),
        helper.make_node(last, ["sm"], ["y"]),
    ]
    value = lambda n, s: helper.make_tensor_value_info(n, TensorProto.FLOAT, s)  # noqa: E731
    weights = [numpy_helper.from_array(W, "w"), numpy_helper.from_array(np.array([1]), "axis")]
    graph = helper.make_graph(nodes, "g", [value("x", ["N", 4, 6]), value("m", ["N", 6])], [value("y", None)], weights)
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))


@pytest.mark.parametrize(("last", "masks"), [("Softmax", [False, True]), ("Relu", [False, False])])
def test_masks_only_reach_a_softmax(last: str, masks: list[bool]) -> None:
    assert [i.masks for i in model(last).inputs()] == masks


def test_finite_values_count() -> None:
    x = np.random.default_rng(1).standard_normal((7, 4, 6)).astype(np.float32)
    m = np.where(np.arange(6) > 3, -np.inf, 0).astype(np.float32)[None].repeat(7, 0)
    reader = ArrayReader({"x": x, "m": m}, {"x": x.dtype, "m": m.dtype}, {})
    data = Dataset(reader, tuple(range(7)), ("x", "m"), "made up", masks=frozenset({"m"}))
    probes = [Probe("sm", MinMax()), Probe("sm", MinMax(-1)), Probe("m", AbsMax())]
    found = sweep(model(), data, probes, batch=3, threads=1)
    seen = (x @ W)[..., :4]
    assert found[probes[0]].lo == pytest.approx(seen.min(), rel=1e-5)  # type: ignore[attr-defined]
    assert np.isfinite(found[probes[1]].lo).all()  # type: ignore[attr-defined]
    assert found[probes[2]].amax == 0  # type: ignore[attr-defined]
