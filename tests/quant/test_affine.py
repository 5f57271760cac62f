from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto as T
from onnx import helper

from qcompile.quant.affine import dequantize, fake_quant, qparams_from_range, quantize, scale_shape, storage_dtype
from qcompile.quant.qtype import FLOAT8E4M3FN, INT4, INT8, INT16, UINT4, UINT8, UINT16, QType, simulated_int
from qcompile.quant.spec import Granularity, PerAxis, PerBlock, PerTensor, QParams

finite = st.floats(-1e6, 1e6, width=32)
INTEGERS = [INT8, UINT8, INT16, UINT16, INT4, UINT4]


def ort_round_trip(
    x: NDArray[Any], qparams: QParams, qtype: QType, granularity: Granularity
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Codes (as int32 or float32) and values that ONNX Runtime's Q and DQ give with optimizations off."""
    axis = {} if isinstance(granularity, PerTensor) else {"axis": granularity.axis}
    block = {"block_size": granularity.size} if isinstance(granularity, PerBlock) else {}
    element = getattr(T, qtype.storage)
    zero_point = qparams.zero_point.astype(storage_dtype(qtype))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **axis, **block),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **axis, **block),
        helper.make_node("Cast", ["q"], ["c"], to=T.FLOAT),
    ]
    z = onnx.numpy_helper.from_array(zero_point, "z")
    s = onnx.numpy_helper.from_array(qparams.scale.astype(np.float32), "s")
    outputs = [helper.make_tensor_value_info(n, T.FLOAT, None) for n in ("c", "y")]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", T.FLOAT, x.shape)], outputs, [s, z])
    assert z.data_type == element
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    codes, values = session.run(None, {"x": x})
    return np.asarray(codes), np.asarray(values)


@settings(max_examples=60, deadline=None)
@given(
    x=hnp.arrays(np.float32, (4, 6), elements=finite),
    spread=st.floats(0.01, 2.0),
    qtype=st.sampled_from([*INTEGERS, FLOAT8E4M3FN]),
    granularity=st.sampled_from([PerTensor(), PerAxis(0), PerAxis(1), PerBlock(1, 2)]),
    symmetric=st.booleans(),
)
def test_matches_onnxruntime(x: NDArray[Any], spread: float, qtype: QType, granularity: Granularity, symmetric: bool) -> None:
    if isinstance(granularity, PerBlock) and qtype is FLOAT8E4M3FN:
        granularity = PerTensor()
    shape = scale_shape(x.shape, granularity)
    lo, hi = np.full(shape, float(x.min()) * spread), np.full(shape, float(x.max()) * spread)
    qparams = qparams_from_range(lo, hi, qtype, symmetric)
    codes, values = ort_round_trip(x, qparams, qtype, granularity)
    ours = quantize(x, qparams, qtype, granularity)
    assert ours.dtype == storage_dtype(qtype)
    np.testing.assert_array_equal(ours.astype(np.float32), codes)
    np.testing.assert_array_equal(dequantize(ours, qparams, granularity), values)
    np.testing.assert_array_equal(fake_quant(x, qparams, qtype, granularity), values)


@given(lo=finite, hi=finite, qtype=st.sampled_from([*INTEGERS, simulated_int(4), simulated_int(6, signed=False)]))
def test_range_covers_zero_exactly(lo: float, hi: float, qtype: QType) -> None:
    lo, hi = min(lo, hi), max(lo, hi)
    qparams = qparams_from_range(lo, hi, qtype, symmetric=False)
    assert qparams.scale > 0
    assert qtype.qmin <= qparams.zero_point <= qtype.qmax
    assert fake_quant(np.zeros(1, np.float32), qparams, qtype)[0] == 0
    ends = np.array([min(lo, 0), max(hi, 0)], np.float32)
    if ends[1] - ends[0] > 1e-30:
        assert np.abs(fake_quant(ends, qparams, qtype) - ends).max() <= 1.01 * float(qparams.scale)


def test_symmetric_range() -> None:
    qparams = qparams_from_range([-4.0, 0.0], [2.0, 0.0], INT8)
    np.testing.assert_array_equal(qparams.scale, [np.float32(4 / 127), 1.0])
    np.testing.assert_array_equal(qparams.zero_point, [0, 0])


def test_dead_and_tiny_ranges_have_scale_one() -> None:
    assert qparams_from_range(0.0, 0.0, INT8).scale == 1
    assert qparams_from_range(0.0, 1e-44, UINT8, symmetric=False).scale == 1


def test_a_range_must_be_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        qparams_from_range(0.0, np.inf, INT8)


def test_float8_saturates() -> None:
    qparams = qparams_from_range(-448.0, 448.0, FLOAT8E4M3FN)
    x = np.array([1e9, -1e9, 460.0, 0.3], np.float32)
    codes = quantize(x, qparams, FLOAT8E4M3FN)
    np.testing.assert_array_equal(codes.astype(np.float32), [448, -448, 448, np.float32(ml_dtypes.float8_e4m3fn(0.3))])


def test_narrow_codes_stay_in_their_width() -> None:
    qtype = simulated_int(4)
    codes = quantize(np.linspace(-9, 9, 50, dtype=np.float32), qparams_from_range(-7.0, 7.0, qtype), qtype)
    assert codes.dtype == np.int8
    assert (codes.min(), codes.max()) == (-8, 7)


def test_ragged_last_block() -> None:
    x = np.arange(10, dtype=np.float32).reshape(2, 5)
    spec = PerBlock(1, 2)
    qparams = qparams_from_range(np.zeros((2, 3)), np.full((2, 3), 9.0), INT8)
    assert np.abs(fake_quant(x, qparams, INT8, spec) - x).max() <= 0.5 * 9 / 127 + 1e-6


def test_dtype_is_kept_and_shapes_are_checked() -> None:
    qparams = qparams_from_range(-1.0, 1.0, INT8)
    assert fake_quant(np.ones((2, 2), np.float64), qparams, INT8).dtype == np.float64
    assert fake_quant(np.ones((2, 2), np.float16), qparams, INT8).dtype == np.float16
    with pytest.raises(ValueError, match=r"needs a scale of shape \(2,\)"):
        quantize(np.ones((2, 2), np.float32), qparams, INT8, PerAxis(0))
