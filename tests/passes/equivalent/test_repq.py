from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper

from qcompile.ir.model import Model
from qcompile.passes.equivalent.repq import reparameterize, scales
from qcompile.quant.affine import fake_quant, qparams_from_range
from qcompile.quant.qtype import INT8
from qcompile.quant.spec import PerAxis
from qcompile.report import Remark
from tests.passes.measures import outputs, sqnr_db
from tests.passes.models import built
from tests.passes.running import context, pipeline

RNG = np.random.default_rng(0)


def random(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def test_the_common_zero_point_of_repq_is_an_integer() -> None:
    """The official code leaves a mean of integers, so that its codes are not those of the per-channel quantizer."""
    lo, hi = -RNG.uniform(0.1, 3, 64), RNG.uniform(0.1, 9, 64)
    for symmetric in (True, False):
        s, z = scales(lo, hi, 8)
        r, t = reparameterize(lo, hi, 8, symmetric, True)
        steps = t / s
        assert np.allclose(steps, np.rint(steps), atol=1e-9) and np.array_equal(z, np.rint(z))
        x = RNG.uniform(lo, hi, (500, 64))
        common = s.mean()
        zero = np.rint(steps + z)[0]
        shared = np.rint((x - t) / r / common) + zero
        each = np.rint(x / s) + z
        assert np.mean(shared != each) < 1e-3, "code for code; only ties may round apart"


@pytest.mark.parametrize("factor", [0.25, 8.0, 3.7])
def test_the_common_scale_of_repq_does_not_matter(factor: float) -> None:
    """Multiplying s~ scales x' and W' by one number; re-quantized weights and activations follow exactly."""
    x, w = random(64, 32), random(32, 16)
    a, b = (_quantized_product(x / k, w * k) for k in (1.0, factor))
    assert np.abs(a - b).max() <= (0.0 if np.log2(factor) % 1 == 0 else 1e-5) * np.abs(a).max()


def _quantized_product(x: NDArray[np.float32], w: NDArray[np.float32]) -> NDArray[np.float64]:
    top = np.abs(w).max(0).astype(np.float64)
    qx = fake_quant(x, qparams_from_range(x.min().astype(np.float64), x.max().astype(np.float64), INT8, True), INT8)
    qw = fake_quant(w, qparams_from_range(-top, top, INT8, True), INT8, PerAxis(1))
    return qx.astype(np.float64) @ qw.astype(np.float64)


def step(gains: float) -> Model:
    """LayerNorm -> MLP as a decoder sees it, one token a sample; the norm's gains are e^normal * `gains`."""
    rng, node = np.random.default_rng(0), helper.make_node
    shapes = {"b": (64,), "u": (64, 128), "c": (128,), "v": (128, 64)}
    held = {"g": np.exp(rng.standard_normal(64) * gains)} | {n: rng.standard_normal(s) * 0.1 for n, s in shapes.items()}
    nodes = [
        node("LayerNormalization", ["x", "g", "b"], ["n"], name="norm", axis=-1),
        node("MatMul", ["n", "u"], ["h0"], name="fc1"),
        node("Add", ["h0", "c"], ["h"], name="bias"),
        node("Relu", ["h"], ["a"], name="act"),
        node("MatMul", ["a", "v"], ["y"], name="fc2"),
    ]
    return built(nodes, ["N", 1, 64], {n: a.astype(np.float32) for n, a in held.items()})


def held_out(passes: str, model: Model, samples: int) -> tuple[float, list[Remark]]:
    """SQNR in dB on new samples, and what repq says."""
    ctx, new = context("trt"), {"x": np.random.default_rng(99).standard_normal((400, 1, 64)).astype(np.float32)}
    seen = {"x": np.random.default_rng(samples).standard_normal((samples, 1, 64)).astype(np.float32)}
    made, reports = pipeline(passes, model, seen, ctx)
    said = [r for x in reports for r in x.remarks if r.pass_name == "repq"]
    return sqnr_db(outputs(model, new)[0], outputs(made, new)[0]), said


@pytest.mark.parametrize("samples", [2, 16, 40, 64])
@pytest.mark.parametrize("gains", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("passes", ["repq", "repq{percentile=minmax}", "repq,smooth"])
def test_few_rows_never_cost(passes: str, gains: float, samples: int) -> None:
    assert held_out(passes, step(gains), samples)[0] >= held_out("", step(gains), samples)[0] - 0.2


def test_a_site_that_does_not_pay_is_left_alone_with_a_remark() -> None:
    _, (few,) = held_out("repq", step(0.1), 40)
    assert few.kind == "missed" and "held-out rows would hardly fall" in few.reason and float(few.numbers["gain_db"]) < 0
    _, (one,) = held_out("repq", step(0.1), 1)
    assert one.kind == "missed" and "too few rows" in one.reason
    plain, (many,) = held_out("", step(1.0), 1024)[0], held_out("repq", step(1.0), 1024)[1]
    assert many.kind == "applied" and held_out("repq", step(1.0), 1024)[0] > plain + 1.0
