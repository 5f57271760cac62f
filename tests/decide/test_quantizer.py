"""Text of quantizers, and codes: a rounding that a pass found."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from qcompile.decide.quantizer import PREFIX, Quantizer, from_text
from qcompile.ir.model import Model
from qcompile.quant.affine import dequantize, fake_quant, quantize, storage_dtype
from qcompile.quant.qtype import FLOAT8E4M3FN, INT4, INT8, UINT8, QType, simulated_int
from qcompile.quant.spec import PerAxis, PerBlock, PerTensor, QParams, QuantSpec
from tests.ir import tiny

TYPES = [INT8, UINT8, INT4, FLOAT8E4M3FN, simulated_int(6)]
granularities = st.one_of(
    st.builds(PerTensor), st.builds(PerAxis, st.integers(0, 7)), st.builds(PerBlock, st.integers(0, 7), st.integers(1, 256))
)
specs = st.builds(QuantSpec, st.sampled_from(TYPES), granularities, st.booleans())


@st.composite
def qparams(draw: st.DrawFn) -> QParams:
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=2, max_side=5))
    scale = draw(hnp.arrays(np.float64, shape, elements=st.floats(1e-30, 1e30)))
    zero_point = draw(hnp.arrays(np.int64, shape, elements=st.integers(-(2**62), 2**62)))
    return QParams(scale, zero_point, draw(st.none() | st.floats(1e-9, 1e9)), tuple(draw(st.lists(st.floats(-9, 9), max_size=3))))


@st.composite
def found(draw: st.DrawFn) -> Quantizer:
    quantizer = Quantizer(draw(specs), draw(st.none() | qparams()))
    if quantizer.qparams is None or draw(st.booleans()):
        return quantizer
    t = quantizer.spec.qtype
    wide = draw(hnp.arrays(np.int64, draw(hnp.array_shapes(max_dims=3)), elements=st.integers(int(t.qmin), int(t.qmax))))
    return quantizer.with_codes(wide.astype(storage_dtype(t)))


@settings(deadline=None)
@given(found(), st.sampled_from([0, 1, ~0]))
def test_what_is_written_is_read_back_exactly(q: Quantizer, slot: int) -> None:
    node: ir.Node = Model.from_proto(tiny.linear()).graph.node(0)
    key = f"{PREFIX}{slot}"
    text = q.to_text(node, key)
    back = from_text(text)
    assert back.equals(q) and q.equals(back) and back.to_text(node, key) == text
    if q.codes is not None:
        assert back.codes is not None and back.codes.dtype == q.codes.dtype
        assert not back.equals(Quantizer(q.spec, q.qparams))


def codes(x: NDArray[np.float32], q: Quantizer) -> NDArray[np.float32]:
    """Nearest codes, each moved one step towards 0."""
    near = quantize(x, q.known, q.spec.qtype, q.spec.granularity).astype(np.float32)
    return (near - np.sign(near)).astype(storage_dtype(q.spec.qtype))


@pytest.mark.parametrize("qtype", [INT8, INT4, simulated_int(6)])
def test_readers_see_the_codes(qtype: QType) -> None:
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    near = Quantizer(QuantSpec(qtype, PerAxis(1)), QParams(np.full(4, 0.25), np.zeros(4, np.int64)))
    assert np.array_equal(near.coded(x), quantize(x, near.known, qtype, PerAxis(1)))
    assert np.array_equal(near.rounded(x), fake_quant(x, near.known, qtype, PerAxis(1)))
    q = near.with_codes(codes(x, near))
    assert q.coded(x) is q.codes and not np.array_equal(q.rounded(x), near.rounded(x))
    assert np.array_equal(q.rounded(x), dequantize(codes(x, near), near.known, PerAxis(1)))
    assert q.coded(x, QParams(near.known.scale * 1.01, near.known.zero_point)) is q.codes, "a rounded scale moves no code"
    assert q.with_qparams(near.known).codes is None, "codes belong to the grid that they were found on"


@pytest.mark.parametrize(
    ("params", "array", "message"),
    [
        (None, np.zeros(2, np.int8), "without a scale; give qparams"),
        (1.0, np.zeros(2, np.int32), "are int8, not int32; cast"),
        (1.0, np.full(2, 40, np.int8), r"lie in \[-32, 31\]; clip"),
    ],
)
def test_codes_that_make_no_sense_are_refused(params: float | None, array: NDArray[np.int8], message: str) -> None:
    qparams = None if params is None else QParams(np.array(params), np.array(0))
    with pytest.raises(ValueError, match=message):
        Quantizer(QuantSpec(simulated_int(6)), qparams, array)


def test_codes_of_another_shape_are_refused() -> None:
    q = Quantizer(QuantSpec(INT4), QParams(np.array(1.0), np.array(0)), np.zeros((2, 3), ml_dtypes.int4))
    with pytest.raises(ValueError, match=r"codes of shape \(2, 3\) for a tensor of shape \(3, 2\); find them again"):
        q.rounded(np.zeros((3, 2), np.float32))
