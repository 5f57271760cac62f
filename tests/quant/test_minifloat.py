"""Small floats: every code, every midpoint, against ml_dtypes and ONNX Runtime."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qcompile.execute.session import make_session
from qcompile.quant.minifloat import E2M1, E4M3, MiniFloat, decode, e8m0_exponents, e8m0_values, round_minifloat

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
