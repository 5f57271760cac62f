from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from qcompile.decide.decisions import decide, decision
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array
from qcompile.pipeline import registry
from qcompile.quant.companding import twin_branches
from qcompile.quant.spec import QParams
from qcompile.target.check import check
from tests.passes.companded import arrays, points, relu_block
from tests.passes.measures import outputs, relative_error
from tests.passes.models import block, built
from tests.passes.running import context, pipeline, run_passes, step

node = helper.make_node


@pytest.mark.parametrize("spec", ["split-range", "split-range{softmax mlp=false}", "split-range{softmax}"])
@pytest.mark.parametrize("target", ["trt", "ort"])
def test_split_range_keeps_the_function_and_quantizes_both(spec: str, target: str) -> None:
    done = step(registry.parse(spec)[0], block(), arrays(), context(target))
    assert done.changed and relative_error(outputs(done.before, arrays()), outputs(done.after, arrays())) <= 1e-6
    if target == "ort":
        return
    made, _ = pipeline(spec, block(), arrays(), context("trt"))
    assert not [f for f in check(made.to_proto(), "trt") if f.severity == "error"]
    for n in made.graph:
        if str(n.name).endswith(("_first", "_second")):
            assert {v.producer().op_type for v in n.inputs} == {"DequantizeLinear"}, n.name  # type: ignore[union-attr]


@pytest.mark.parametrize("which", ["mlp", "softmax"])
def test_the_sum_of_the_branches_is_the_piecewise_quantizer(which: str) -> None:
    """Bit for bit: steps and weights are powers of two, so that sums are exact."""
    x = np.abs(points()) if which == "softmax" else points()
    rows = x.reshape(-1)[: 2**14].reshape(4, 16, 256)
    low, high, split = twin_branches(1.0, 3, 8, True)
    low_scale, high_scale = (low[0], high[0]) if which == "softmax" else (2.0**-7, 2.0**-9)
    parts = (rows < np.float32(split)) if which == "softmax" else (rows > 0)
    pieces = [np.where(parts, rows, 0), np.where(parts, 0, rows)]
    expected = np.zeros_like(rows)
    for piece, s in zip(pieces, (low_scale, high_scale), strict=True):
        expected += np.clip(np.rint(piece / np.float32(s)), -128, 127) * np.float32(s)
    model = branch_model(which, split)
    for n, d in ((n, s) for n, s in zip(branches(model), (low_scale, high_scale), strict=True)):
        slot_decision = decision(n, 0)
        assert slot_decision is not None
        decide(n, 0, slot_decision.with_qparams(QParams(np.asarray(d), np.zeros((), np.int64))))
    lowered, _ = run_passes(model, registry.parse("rtn,insert-qdq"), {"x": rows}, context("trt"))
    assert np.array_equal(outputs(lowered, {"x": rows})[0], 127 * expected)


def branches(model: Model) -> list[ir.Node]:
    return [n for n in model.graph if n.op_type == "MatMul" and str(n.name).endswith(("_first", "_second"))]


def branch_model(which: str, split: float) -> Model:
    """Two products with 127 I, whose weight scale is 1, over the parts of x, decided for INT8."""
    eye = np.eye(256, dtype=np.float32) * 127
    constants = {"w1": eye, "w2": eye, "split": np.float32(split), "zero": np.float32(0)}
    cut = [
        node("Less", ["x", "split"], ["c"], name="below"),
        node("Where", ["c", "x", "zero"], ["a"], name="low"),
        node("Sub", ["x", "a"], ["b"], name="high"),
    ]
    signs = [node("Relu", ["x"], ["a"], name="pos"), node("Min", ["x", "zero"], ["b"], name="neg")]
    nodes = [
        *(cut if which == "softmax" else signs),
        node("MatMul", ["a", "w1"], ["p"], name="fc_first"),
        node("MatMul", ["b", "w2"], ["q"], name="fc_second"),
        node("Add", ["p", "q"], ["y"], name="sum"),
    ]
    x = {"x": np.abs(points()).reshape(-1)[: 2**14].reshape(4, 16, 256)}
    used = constants if which == "softmax" else {k: v for k, v in constants.items() if k != "split"}
    ctx = context("trt", quantize=("fc_first", "fc_second"))
    return run_passes(built(nodes, ["N", 16, 256], used, opset=19), registry.parse("annotate"), x, ctx)[0]


def test_one_scale_each() -> None:
    model, _ = pipeline("split-range", block(), arrays(), context("trt"))
    branch_scales = {
        str(n.name): float(const_array(n.inputs[0].producer().inputs[1]))  # type: ignore[arg-type,union-attr]
        for n in branches(model)
    }
    assert len(set(branch_scales.values())) == 2


def test_relu_is_refused() -> None:
    done = step(registry.parse("split-range")[0], relu_block(), arrays(), context("ort"))
    assert not done.changed and [r.node for r in done.report.remarks] == ["fc2"]
    assert "one sign" in done.report.remarks[0].reason


def test_a_site_that_the_user_keeps_in_float() -> None:
    done = step(registry.parse("split-range{softmax}")[0], block(), arrays(), context("ort", keep_float=("pv", "fc2")))
    assert not done.changed and all("--keep-float" in r.reason for r in done.report.remarks)
