"""NVFP4 and MXFP8: scales of weights and activations, and the search for better ones."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from qcompile.quant.affine import fake_quant, quantize
from qcompile.quant.blockformats import (
    block_amax,
    mxfp8_dynamic,
    mxfp8_qparams,
    nvfp4_block_scales,
    nvfp4_dynamic,
    nvfp4_qparams,
    nvfp4_search,
    nvfp4_tensor_scale,
)
from qcompile.quant.minifloat import E2M1, E4M3, e8m0_values, round_minifloat
from qcompile.quant.qtype import FLOAT4E2M1, FLOAT8E4M3FN
from qcompile.quant.spec import PerBlock

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("amax", [1e-6, 3e-3, 0.7, 1.0, 2688.0, 5e4])
def test_the_tensor_scale_covers_and_is_exact_in_16_bits(amax: float) -> None:
    scale = nvfp4_tensor_scale(amax)
    assert amax / 2688 <= scale <= max(amax / 2688 * (1 + 2**-7), amax / 2688 + 2**-24)
    assert float(np.float16(scale)) == scale
    if scale >= 2**-14:
        assert float(ml_dtypes.bfloat16(scale)) == scale
    assert nvfp4_tensor_scale(0.0) == 1.0


def test_nvfp4_weights_follow_the_formula() -> None:
    w = (RNG.standard_normal((64, 24)) * np.exp2(RNG.uniform(-6, 2, 24))).astype(np.float32)
    w[16:32, 3] = 0
    params = nvfp4_qparams(w, 0)
    assert params.scale.shape == (4, 24) and params.tensor_scale is not None
    blocks = params.scale / params.tensor_scale
    np.testing.assert_array_equal(blocks, round_minifloat(blocks, E4M3), "block scales are E4M3 numbers")
    assert blocks[1, 3] == 1, "a block of zeros has scale 1"
    divisor = np.repeat(params.scale.astype(np.float32), 16, axis=0)
    expected = round_minifloat(w / divisor, E2M1) * divisor
    np.testing.assert_array_equal(fake_quant(w, params, FLOAT4E2M1, PerBlock(0, 16)), expected)
    assert (expected[16:32, 3] == 0).all()
    noise = np.square(w - expected).sum() / np.square(w).sum()
    assert 18 < -10 * np.log10(noise) < 23


def test_nvfp4_on_a_gaussian_has_the_known_snr() -> None:
    w = RNG.standard_normal((512, 512)).astype(np.float32)
    error = fake_quant(w, nvfp4_qparams(w, 0), FLOAT4E2M1, PerBlock(0, 16)) - w
    assert -10 * np.log10(np.square(error).mean()) == pytest.approx(20.43, abs=0.15)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_searched_block_scales_lower_the_error_of_every_block(axis: int, weighted: bool) -> None:
    w = (RNG.standard_normal((64, 48)) ** 3).astype(np.float32)
    importance = RNG.uniform(0.1, 10, (64, 1) if axis == 0 else (1, 48)) if weighted else None
    plain, searched = nvfp4_qparams(w, axis), nvfp4_search(w, axis, importance)
    errors: list[NDArray[np.float64]] = []
    for params in (plain, searched):
        residual = np.square(fake_quant(w, params, FLOAT4E2M1, PerBlock(axis, 16)) - w) * (
            1 if importance is None else importance
        )
        errors.append(np.add.reduceat(residual, np.arange(0, w.shape[axis], 16), axis=axis))
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()
    assert searched.tensor_scale is not None and searched.tensor_scale == plain.tensor_scale
    blocks = searched.scale / searched.tensor_scale
    np.testing.assert_array_equal(blocks, round_minifloat(blocks, E4M3))


def test_mxfp8_weights_follow_the_formula() -> None:
    w = (RNG.standard_normal((24, 64)) * 3).astype(np.float32)
    params = mxfp8_qparams(w, 1)
    assert params.scale.shape == (24, 2) and params.tensor_scale is None
    assert (np.log2(params.scale) % 1 == 0).all()
    divisor = np.repeat(params.scale.astype(np.float32), 32, axis=1)
    codes = quantize(w, params, FLOAT8E4M3FN, PerBlock(1, 32))
    np.testing.assert_array_equal(codes.astype(np.float32), round_minifloat(w / divisor, E4M3))
    assert np.abs(w / divisor).max() <= 448


def test_dynamic_quantizers_agree_with_the_weights_formula() -> None:
    x = RNG.standard_normal((3, 5, 64)).astype(np.float32)
    params = nvfp4_qparams(x, -1)
    assert params.tensor_scale is not None
    values, scales = nvfp4_dynamic(x, params.tensor_scale)
    np.testing.assert_array_equal(scales * np.float32(params.tensor_scale), params.scale.astype(np.float32))
    np.testing.assert_array_equal(values, quantize(x, params, FLOAT4E2M1, PerBlock(2, 16)).astype(np.float32))
    codes, exponents = mxfp8_dynamic(x)
    np.testing.assert_array_equal(e8m0_values(exponents), mxfp8_qparams(x, -1).scale)
    np.testing.assert_array_equal(codes, quantize(x, mxfp8_qparams(x, -1), FLOAT8E4M3FN, PerBlock(2, 32)).astype(np.float32))


def test_block_scales_saturate_and_zero_blocks_become_one() -> None:
    scales = nvfp4_block_scales(np.array([0.0, 1e-9, 6.0, 1e9], np.float32), 1.0)
    np.testing.assert_array_equal(scales, [1, 1, 1, 448])


def test_a_length_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of the block size 16"):
        block_amax(np.zeros((24, 4)), 0, 16)
