"""opset: raised by ONNX's converter, weights and their order kept."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from qcompile.errors import ModelError
from qcompile.pipeline import registry
from tests.passes.measures import outputs
from tests.passes.models import built
from tests.passes.running import context, run_passes


def test_constants_keep_their_order() -> None:
    """Large ones travel beside the converter; the order of a set would differ from process to process."""
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.standard_normal((160, 160)).astype(np.float32) for i in range(12)}
    nodes = [helper.make_node("MatMul", [f"t{i}" if i else "x", w], [f"t{i + 1}"], name=w) for i, w in enumerate(weights)]
    model = built(nodes, ["N", 4, 160], weights, opset=13, outs=("t12",))
    feeds = {"x": rng.standard_normal((2, 4, 160)).astype(np.float32)}
    after, _ = run_passes(model, registry.parse("opset{version=21}"), feeds, context("trt"))
    assert after.opset == 21 and list(after.graph.initializers) == list(weights)
    assert np.array_equal(outputs(model, feeds)[0], outputs(after, feeds)[0])


def test_scan_of_opset_8_is_refused() -> None:
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])  # noqa: E731
    body = helper.make_graph([helper.make_node("Identity", ["n"], ["m"])], "body", [value("n")], [value("m")])
    scan = helper.make_node("Scan", ["", "x"], ["y"], num_scan_inputs=1, body=body)
    model = built([scan], [1, 3, 2], {"unused": np.zeros(1, np.float32)}, opset=8, outs=("y",))
    with pytest.raises(ModelError, match=r"Scan of opset 8 .*; export at opset 9 or later"):
        registry.parse("opset{version=19}")[0].apply(model, context("trt"))
