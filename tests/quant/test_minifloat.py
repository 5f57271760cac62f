"""Small floats: every code, every midpoint, against ml_dtypes and ONNX Runtime; the block formats' scales."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qcompile.execute.session import make_session
from qcompile.quant.affine import fake_quant, quantize
from qcompile.quant.minifloat import (
    E2M1,
    E4M3,
    MiniFloat,
    block_amax,
    decode,
    e8m0_exponents,
    e8m0_values,
    mxfp8_dynamic,
    mxfp8_qparams,
    nvfp4_block_scales,
    nvfp4_dynamic,
    nvfp4_qparams,
    nvfp4_search,
    nvfp4_tensor_scale,
    round_minifloat,
)
from qcompile.quant.qtype import FLOAT4E2M1, FLOAT8E4M3FN
from qcompile.quant.spec import PerBlock

FORMS = [(E4M3, ml_dtypes.float8_e4m3fn, 8), (E2M1, ml_dtypes.float4_e2m1fn, 4)]
FORM_IDS = ["e4m3", "e2m1"]
RNG = np.random.default_rng(0)


def finite_codes(form: MiniFloat, bits: int) -> NDArray[np.float32]:
    values = decode(np.arange(2**bits), form)
    return values[np.isfinite(values)]


def probes(form: MiniFloat) -> NDArray[np.float32]:
    """100,000 points: wide, dense near zero, ties, saturation, zeros and subnormals."""
    codes = finite_codes(form, 8 if form is E4M3 else 4)
    ordered = np.unique(codes)
    ties = (ordered[1:] + ordered[:-1]) / 2
    wide = RNG.standard_normal(40_000) * form.largest / 2
    small = RNG.standard_normal(40_000) * float(ordered[ordered > 0].min()) * 4
    spread = np.exp2(RNG.uniform(-20, 20, 20_000)) * RNG.choice([-1, 1], 20_000)
    ends = [0.0, -0.0, form.largest, -form.largest, 1e30, -1e30, np.inf, -np.inf, 1e-45, 1e-38]
    return np.concatenate([codes, ties, np.nextafter(ties, 0), np.nextafter(ties, 9e9), wide, small, spread, ends]).astype(
        np.float32
    )


@pytest.mark.parametrize(("form", "dtype", "bits"), FORMS, ids=FORM_IDS)
def test_every_code_decodes_as_ml_dtypes_and_rounds_to_itself(form: MiniFloat, dtype: type, bits: int) -> None:
    codes = np.arange(2**bits, dtype=np.uint8)
    expected = codes.view(dtype).astype(np.float32) if bits == 8 else decode_4bit(codes)
    np.testing.assert_array_equal(decode(codes, form), expected)
    values = finite_codes(form, bits)
    again = round_minifloat(values, form)
    np.testing.assert_array_equal(again.view(np.uint32), values.view(np.uint32))


def decode_4bit(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)[codes]


@pytest.mark.parametrize(("form", "dtype", "bits"), FORMS, ids=FORM_IDS)
def test_midpoints_go_to_the_even_code(form: MiniFloat, dtype: type, bits: int) -> None:
    positive = decode(np.arange(2 ** (bits - 1)), form)
    positive = positive[np.isfinite(positive)]
    middle = (positive[1:].astype(np.float64) + positive[:-1]) / 2
    even = np.where(np.arange(len(middle)) % 2 == 0, positive[:-1], positive[1:])
    np.testing.assert_array_equal(round_minifloat(middle, form), even)
    np.testing.assert_array_equal(round_minifloat(-middle, form), -even)


@pytest.mark.parametrize(("form", "dtype", "bits"), FORMS, ids=FORM_IDS)
def test_rounding_equals_ml_dtypes_and_saturates(form: MiniFloat, dtype: type, bits: int) -> None:
    x = probes(form)
    clipped = np.clip(x, -form.largest, form.largest)
    rounded = round_minifloat(x, form)
    np.testing.assert_array_equal(rounded, clipped.astype(dtype).astype(np.float32))
    assert np.array_equal(np.signbit(rounded), np.signbit(x)), "the sign of zero is kept"
    assert np.isnan(round_minifloat(np.float32(np.nan), form))


def test_e4m3_rounding_equals_onnx_runtime() -> None:
    x = probes(E4M3)
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None]) for n in ("x", "y")]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["y"]),
    ]
    constants = [
        helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]),
    ]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = make_session(model.SerializeToString(), optimize="off", qdq_fusion=False, threads=1)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], round_minifloat(x, E4M3))


def test_e8m0_is_the_smallest_power_of_two_that_covers() -> None:
    powers = np.exp2(np.arange(-40, 41)).astype(np.float32) * 448
    beside = [np.nextafter(powers, np.float32(end)) for end in (0, np.inf)]
    amax = np.concatenate([powers, *beside, RNG.uniform(0, 1e4, 1000)])
    scale = e8m0_values(e8m0_exponents(amax)).astype(np.float64)
    assert (amax <= 448 * scale).all() and (amax > 448 * scale / 2).all()
    assert e8m0_exponents(np.float32(0)) == 0 and e8m0_values(127) == 1.0
    assert e8m0_exponents(np.float32(3.4e38)) <= 254
    np.testing.assert_array_equal(e8m0_values([0, 254]), np.array([2.0**-127, 2.0**127], np.float32))


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
