"""Companded codes in the graph: equal to their reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper

from qcompile.decide.quantizer import Quantizer
from qcompile.ir.edit import insert_after, redirect
from qcompile.quant.companding import codebook, companded_type, fit
from qcompile.quant.qtype import qtype
from qcompile.quant.spec import QParams, QuantSpec
from qcompile.rewrite.companding import companded_activation
from tests.passes.companded import points
from tests.passes.measures import outputs
from tests.passes.models import built

KINDS = ("log2", "log-sqrt2", "sulq", "adalog", "tan", "twin", "uniform")


node = helper.make_node


def coded_by_graph(name: str, params: QParams, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The lowering of one quantizer, run by ONNX Runtime."""
    model = built([node("Identity", ["x"], ["h"], name="h"), node("Relu", ["h"], ["y"], name="end")], ["N", 2], {}, opset=19)
    value, end = model.graph.node(0).outputs[0], model.graph.node(1)
    chain = companded_activation(model.graph, value, Quantizer(QuantSpec(qtype(name))), params)
    insert_after(model.graph, value, *chain)
    redirect(end.outputs[0], chain[-1].outputs[0], [])
    model.graph.outputs[0] = chain[-1].outputs[0]
    return outputs(model, {"x": x})[0]


@pytest.mark.parametrize("kind", [*KINDS, "twin-gelu"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("paper", [False, True])
def test_the_graph_is_its_reference_bit_for_bit(kind: str, bits: int, paper: bool) -> None:
    x, coded = points(), companded_type(kind, bits, paper)
    params = fit(coded, np.abs(x[:2000]) if kind != "twin-gelu" else x[:2000], shift=0.1 if kind == "adalog" else 0.0)
    book = codebook(coded, params)
    ties = np.resize(np.concatenate([book.thresholds, np.nextafter(book.thresholds, np.float32(-1))]), (300, 2))
    feed = np.concatenate([x, ties.astype(np.float32)])
    assert np.array_equal(coded_by_graph(coded.name, params, feed), book.fake_quant(feed).astype(np.float32))


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("name", ["log2u4@float8e4m3fn", "log2u4p@float8e4m3fn", "log2u3@float8e4m3fn"])
def test_powers_of_two_go_through_fp8_unrounded(name: str, scale: float) -> None:
    """Log and Exp are within an ulp, so only numbers beside a tie may differ; FP8 rounds none of the others."""
    params, x = QParams(np.asarray(scale), np.zeros((), np.int64)), np.abs(points())
    got, book = coded_by_graph(name, params, x), codebook(qtype(name), params)
    away = np.abs(x[..., None] / book.thresholds - 1).min(-1) > 1e-5
    assert away.mean() > 0.999
    codes = (got / np.float32(scale * 2.0**-8)).astype(np.float32)
    assert np.allclose(got[away], book.fake_quant(x)[away], rtol=1e-6, atol=0)
    assert np.allclose(codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), codes, rtol=1e-6)
