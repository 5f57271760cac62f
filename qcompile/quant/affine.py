"""Affine quantization as ONNX QuantizeLinear / DequantizeLinear define it, in numpy.

    code = clip(rint(x / scale) + zero_point, qmin, qmax)        x ~ (code - zero_point) * scale

The division and the product are done in float32 and rounding is half-to-even, so the codes and the values are
bit-identical to ONNX Runtime's kernels.
"""

from __future__ import annotations

from typing import Any, cast

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from qcompile.quant.qtype import QType
from qcompile.quant.spec import Granularity, PerAxis, PerBlock, PerTensor, QParams

Array = NDArray[Any]
PER_TENSOR = PerTensor()

_STORAGE: dict[str, np.dtype[Any]] = {
    "INT8": np.dtype(np.int8),
    "UINT8": np.dtype(np.uint8),
    "INT16": np.dtype(np.int16),
    "UINT16": np.dtype(np.uint16),
    "INT4": np.dtype(ml_dtypes.int4),
    "UINT4": np.dtype(ml_dtypes.uint4),
    "FLOAT8E4M3FN": np.dtype(ml_dtypes.float8_e4m3fn),
    "FLOAT4E2M1": np.dtype(ml_dtypes.float4_e2m1fn),
}
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


def storage_dtype(qtype: QType) -> np.dtype[Any]:
    """The numpy (or ml_dtypes) element type that holds the codes of `qtype`."""
    return _STORAGE[qtype.storage]


def qparams_from_range(lo: ArrayLike, hi: ArrayLike, qtype: QType, symmetric: bool = True) -> QParams:
    """Scale and zero point that cover [lo, hi], widened to include 0 (arrays of any equal shape).

    Symmetric (always for small floats): scale = max(|lo|, |hi|) / qmax, zero point 0.  Asymmetric:
    scale = (hi - lo) / (qmax - qmin).  Scales are rounded to float32; a range too narrow for one gives scale 1.

    Raises:
        ValueError: an end is NaN or infinite.
    """
    low = np.minimum(np.asarray(lo, np.float64), 0.0)
    high = np.maximum(np.asarray(hi, np.float64), 0.0)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("a quantization range must be finite")
    if symmetric or qtype.family == "float":
        scale = _alive(np.maximum(-low, high) / qtype.qmax)
        return QParams(scale, np.zeros(scale.shape, np.int64))
    scale = _alive((high - low) / (qtype.qmax - qtype.qmin))
    zero_point = np.clip(np.rint(qtype.qmin - low / scale), qtype.qmin, qtype.qmax)
    return QParams(scale, zero_point.astype(np.int64))


def quantize(x: Array, qparams: QParams, qtype: QType, granularity: Granularity = PER_TENSOR) -> Array:
    """Codes of `x` (any shape) in `storage_dtype(qtype)`; equals ONNX Runtime's QuantizeLinear on float32 input."""
    scale, zero_point = _aligned(x, qparams, granularity)
    with np.errstate(over="ignore"):
        ratio = np.divide(x, scale, dtype=np.float32)
    if qtype.family == "float":
        return np.clip(ratio, qtype.qmin, qtype.qmax).astype(storage_dtype(qtype))
    low, high = qtype.qmin - zero_point, qtype.qmax - zero_point
    codes = np.rint(np.clip(ratio, low.astype(np.float32), high.astype(np.float32)))
    return (codes.astype(np.int32) + zero_point.astype(np.int32)).astype(storage_dtype(qtype))


def dequantize(codes: Array, qparams: QParams, granularity: Granularity = PER_TENSOR) -> NDArray[np.float32]:
    """Float32 values (code - zero_point) * scale, as DequantizeLinear computes them."""
    scale, zero_point = _aligned(codes, qparams, granularity)
    return np.multiply(codes.astype(np.float32) - zero_point.astype(np.float32), scale, dtype=np.float32)


def fake_quant(x: Array, qparams: QParams, qtype: QType, granularity: Granularity = PER_TENSOR) -> Array:
    """quantize then dequantize, in the dtype of `x` (the arithmetic is float32, as it runs in ONNX Runtime)."""
    scale, zero_point = _aligned(x, qparams, granularity)
    with np.errstate(over="ignore"):
        out = np.divide(x, scale, dtype=np.float32)
    np.clip(out, (qtype.qmin - zero_point).astype(np.float32), (qtype.qmax - zero_point).astype(np.float32), out=out)
    out = round_codes(out, qtype, out=out)
    return np.multiply(out, scale, out=out).astype(x.dtype, copy=False)


def round_codes(ratio: NDArray[np.float32], qtype: QType, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Nearest representable code of float32 values that are already inside the code range."""
    if qtype.family == "int":
        return np.rint(ratio, out=out)
    return ratio.astype(storage_dtype(qtype)).astype(np.float32)


def scale_shape(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Shape of the scale tensor that quantizes a tensor of `shape`."""
    match granularity:
        case PerTensor():
            return ()
        case PerAxis(axis):
            return (shape[axis],)
        case PerBlock(axis, size):
            return tuple(-(-dim // size) if i == axis % len(shape) else dim for i, dim in enumerate(shape))


def _alive(scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scales as float32 holds them; the ones that would vanish there become 1."""
    with np.errstate(under="ignore"):
        rounded = np.asarray(scale).astype(np.float32).astype(np.float64)
    return cast(NDArray[np.float64], np.asarray(np.where(rounded < _SMALLEST_SCALE, 1.0, rounded)))


def _aligned(x: Array, qparams: QParams, granularity: Granularity) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scale (float32) and zero point shaped to broadcast against `x`."""
    expected = scale_shape(x.shape, granularity)
    scale, zero_point = np.asarray(qparams.scale, np.float32), np.asarray(qparams.zero_point)
    if scale.shape != expected:
        raise ValueError(f"{granularity} of a tensor of shape {x.shape} needs a scale of shape {expected}, got {scale.shape}")
    return _broadcast(scale, x, granularity), _broadcast(zero_point, x, granularity)


def _broadcast(values: Array, x: Array, granularity: Granularity) -> Array:
    match granularity:
        case PerTensor():
            return values
        case PerAxis(axis):
            return values.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
        case PerBlock(axis, size):
            repeated = np.repeat(values, size, axis=axis)
            return repeated.take(np.arange(x.shape[axis]), axis=axis)
