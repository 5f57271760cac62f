"""The two block formats, NVFP4 and MXFP8: small floats in blocks, each with a scale that is a small float too.

    NVFP4                x ~ E2M1 * E4M3 block scale (16 values) * tensor scale
    MXFP8                x ~ E4M3 * E8M0 block scale (32 values)     (OCP Microscaling Formats 1.0, with the exponent rounded up)

The graphs of `qcompile.execute.emulate` equal these functions bit for bit; `rewrite.block_formats` writes them as nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from qcompile.quant.minifloat import E2M1, E4M3, F32, e8m0_exponents, e8m0_values, round_minifloat
from qcompile.quant.qtype import FLOAT4E2M1, FLOAT8E4M3FN
from qcompile.quant.spec import PerBlock, QParams, QuantSpec

NVFP4_BLOCK, MXFP8_BLOCK = 16, 32
_RATIOS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6)


@dataclass(frozen=True, eq=False)
class BlockFormat:
    """How scales of one block format are found; activations are dynamic, their block scales are computed at run time.

    `weight(w, axis)`: min-max scales of blocks along `axis`.  `search(w, axis, importance)`: those of least error; None where
    there is nothing to choose.  `activation(lo, hi)`: what is known of the scales before run time; None if that is nothing.
    """

    name: str
    weight: Callable[[NDArray[Any], int], QParams]
    search: Callable[[NDArray[Any], int, NDArray[Any] | None], QParams] | None = None
    activation: Callable[[ArrayLike, ArrayLike], QParams] | None = None


def block_format(spec: QuantSpec) -> BlockFormat | None:
    """The block format of a spec: blocks of a small float have scales of a small float too; None for all else."""
    return _FORMATS.get(spec.qtype.name) if isinstance(spec.granularity, PerBlock) else None


def nvfp4_tensor_scale(amax: float) -> float:
    """amax / (6 * 448), rounded up to 8 significant bits and a multiple of 2^-24: float32, bfloat16 and float16 hold it exactly.

    1 for a tensor of zeros.
    """
    if amax <= 0:
        return 1.0
    scale = amax / (E2M1.largest * E4M3.largest)
    step = 2.0 ** max(np.frexp(scale)[1] - 8, -24)
    return float(np.ceil(scale / step) * step)


def nvfp4_block_scales(amax: ArrayLike, tensor_scale: float) -> F32:
    """E4M3 block scales for blocks of largest magnitude `amax`: E4M3(amax / 6 / tensor_scale), 1 where that rounds to 0."""
    ratio = np.asarray(amax, np.float32) / np.float32(E2M1.largest) / np.float32(tensor_scale)
    rounded = round_minifloat(ratio, E4M3)
    return np.where(rounded == 0, np.float32(1), rounded)


def nvfp4_qparams(w: NDArray[Any], axis: int) -> QParams:
    """Scales of NVFP4 weights, blocks of 16 along `axis` (its length a multiple): float32(block scale * tensor scale)."""
    top = block_amax(w, axis, NVFP4_BLOCK)
    tensor_scale = nvfp4_tensor_scale(float(top.max(initial=0.0)))
    return nvfp4_from_blocks(nvfp4_block_scales(top, tensor_scale), tensor_scale)


def nvfp4_from_blocks(block_scales: F32, tensor_scale: float) -> QParams:
    """QParams whose scales are the float32 products that DequantizeLinear computes."""
    scale = (block_scales * np.float32(tensor_scale)).astype(np.float64)
    return QParams(scale, np.zeros(scale.shape, np.int64), tensor_scale)


def mxfp8_qparams(w: NDArray[Any], axis: int) -> QParams:
    """Power-of-two scales of MXFP8 weights, blocks of 32 along `axis` (its length a multiple)."""
    scale = e8m0_values(e8m0_exponents(block_amax(w, axis, MXFP8_BLOCK))).astype(np.float64)
    return QParams(scale, np.zeros(scale.shape, np.int64))


def nvfp4_dynamic(x: NDArray[Any], tensor_scale: float) -> tuple[F32, F32]:
    """What TRT_FP4DynamicQuantize makes of x [.., K]: E2M1 values [.., K] and E4M3 block scales [.., K / 16]."""
    wide = x.astype(np.float32)
    scales = nvfp4_block_scales(block_amax(wide, -1, NVFP4_BLOCK), tensor_scale)
    divisor = np.repeat(scales * np.float32(tensor_scale), NVFP4_BLOCK, axis=-1)
    return round_minifloat(wide / divisor, E2M1), scales


def mxfp8_dynamic(x: NDArray[Any]) -> tuple[F32, NDArray[np.uint8]]:
    """What TRT_MXFP8DynamicQuantize makes of x [.., K]: E4M3 values [.., K] and E8M0 codes [.., K / 32]."""
    wide = x.astype(np.float32)
    codes = e8m0_exponents(block_amax(wide, -1, MXFP8_BLOCK))
    return round_minifloat(wide.astype(np.float64) / np.repeat(e8m0_values(codes), MXFP8_BLOCK, axis=-1), E4M3), codes


def block_amax(x: NDArray[Any], axis: int, size: int) -> F32:
    """Largest magnitude of each block of `size` along `axis`, the axis divided by `size`.

    Raises:
        ValueError: the axis is no multiple of `size`.
    """
    axis %= x.ndim
    if x.shape[axis] % size:
        raise ValueError(f"axis {axis} of a tensor of shape {x.shape} is no multiple of the block size {size}")
    split = np.abs(x).reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
    return split.max(axis=axis + 1).astype(np.float32)


def nvfp4_search(w: NDArray[Any], axis: int, importance: NDArray[Any] | None = None) -> QParams:
    """NVFP4 weights with the block scales of least sum(importance * (w - q)^2); never worse than `nvfp4_qparams`.

    Candidates are E4M3(ratio * amax / 6 / tensor_scale): ratios below 1 clip, 1.5 maps the largest value to 4, where E2M1 is
    finer than at 6.  `importance` broadcasts against `w`.
    """
    top, plain = block_amax(w, axis, NVFP4_BLOCK), nvfp4_qparams(w, axis)
    assert plain.tensor_scale is not None
    weights = np.ones((), np.float32) if importance is None else importance.astype(np.float32)
    best = nvfp4_block_scales(top, plain.tensor_scale)
    least = _block_error(w, best, plain.tensor_scale, axis, weights)
    for ratio in _RATIOS:
        scales = nvfp4_block_scales(top * np.float32(ratio), plain.tensor_scale)
        error = _block_error(w, scales, plain.tensor_scale, axis, weights)
        best, least = np.where(error < least, scales, best), np.minimum(error, least)
    return nvfp4_from_blocks(best, plain.tensor_scale)


def _block_error(w: NDArray[Any], scales: F32, tensor_scale: float, axis: int, weights: NDArray[Any]) -> NDArray[np.float64]:
    """Weighted squared error of each block, shaped as `scales`."""
    divisor = np.repeat(scales * np.float32(tensor_scale), NVFP4_BLOCK, axis=axis)
    ratio = np.clip(np.divide(w, divisor, dtype=np.float32), -E2M1.largest, E2M1.largest)
    residual = ratio.astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * divisor - w
    starts = np.arange(0, w.shape[axis], NVFP4_BLOCK)
    return np.add.reduceat(np.square(residual, dtype=np.float64) * weights, starts, axis=axis)


def _nvfp4_activation(lo: ArrayLike, hi: ArrayLike) -> QParams:
    """The tensor scale of a range; the block scales are found at run time."""
    scale = nvfp4_tensor_scale(float(np.maximum(-np.min(lo), np.max(hi))))
    return QParams(np.asarray(scale), np.zeros((), np.int64), scale)


NVFP4 = BlockFormat("nvfp4", nvfp4_qparams, nvfp4_search, _nvfp4_activation)
MXFP8 = BlockFormat("mxfp8", mxfp8_qparams)
_FORMATS = {FLOAT4E2M1.name: NVFP4, FLOAT8E4M3FN.name: MXFP8}
