from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from qcompile.passes.equivalent.repq import reparameterize, scales
from qcompile.quant.affine import fake_quant, qparams_from_range
from qcompile.quant.qtype import INT8
from qcompile.quant.spec import PerAxis

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
