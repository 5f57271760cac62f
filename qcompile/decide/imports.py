"""Q/DQ nodes read as quantizers, and quantizers as another platform has them: the same numbers, or the same range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.decide.quantizer import Quantizer
from qcompile.ir.model import Model
from qcompile.ir.ops import is_const, is_op
from qcompile.ir.qoperators import spell_qdq
from qcompile.ir.quantizers import FP4_DYNAMIC, MXFP8_DYNAMIC, QUANTIZE, Affine, affine, constants
from qcompile.quant import qtype
from qcompile.quant.affine import qparams_from_range
from qcompile.quant.spec import Granularity, PerAxis, PerBlock, PerTensor, QParams, QuantSpec

_TYPES = {
    ir.DataType[t.storage]: t
    for t in (qtype.INT8, qtype.UINT8, qtype.INT16, qtype.UINT16, qtype.INT4, qtype.UINT4, qtype.FLOAT8E4M3FN)
}
_HALF = 128
_NEAR = 1e-3  # of a code: limits are float32


def spec_of(found: Affine) -> QuantSpec | None:
    """The spec of a Q or DQ node; None for codes of a type that has none."""
    kind = _TYPES.get(found.dtype)
    if kind is None:
        return None
    return QuantSpec(kind, granularity(found), symmetric=kind.signed and not found.zero_point.any())


def granularity(found: Affine) -> Granularity:
    """What one scale serves."""
    if not found.scale.ndim:
        return PerTensor()
    return PerBlock(found.axis, found.block) if found.block else PerAxis(found.axis)


def quantizer_of(found: Affine, codes: NDArray[Any] | None = None) -> Quantizer | None:
    """The quantizer of a Q/DQ pair, or of a DQ of constant `codes`; None as `spec_of`."""
    spec = spec_of(found)
    if spec is None:
        return None
    if codes is not None and codes.size and spec.qtype in (qtype.INT8, qtype.UINT8):
        spec = replace(spec, qtype=_least(spec.qtype, int(codes.min()), int(codes.max())))
    return Quantizer(spec, QParams(found.scale, found.zero_point), codes, imported=True)


def narrower(quantizer: Quantizer, low: float, high: float) -> Quantizer | None:
    """The quantizer with as many bits as codes from `low` to `high` need; None where they are not the limits of a width."""
    kind = quantizer.spec.qtype
    if kind not in (qtype.INT8, qtype.UINT8):
        return None
    least = _least(kind, round(low), round(high))
    exact = least.narrow and abs(low - least.qmin) < _NEAR and abs(high - least.qmax) < _NEAR
    return replace(quantizer, spec=replace(quantizer.spec, qtype=least)) if exact else None


def _least(kind: qtype.QType, low: int, high: int) -> qtype.QType:
    """The integer of fewest bits, in the storage of `kind`, that holds both."""
    widths = (qtype.simulated_int(bits, kind.signed) for bits in range(2, 8))
    return next((t for t in widths if t.qmin <= low and high <= t.qmax), kind)


def other_sign(quantizer: Quantizer) -> Quantizer | None:
    """The same numbers in int8 instead of uint8 or the reverse; None for other types."""
    spec, params = quantizer.spec, quantizer.known
    if spec.qtype not in (qtype.INT8, qtype.UINT8):
        return None
    to, shift = (qtype.UINT8, _HALF) if spec.qtype.signed else (qtype.INT8, -_HALF)
    zero = params.zero_point + shift
    codes = None if quantizer.codes is None else (quantizer.codes.astype(np.int16) + shift).astype(to.storage.lower())
    made = replace(spec, qtype=to, symmetric=to.signed and not zero.any())
    return Quantizer(made, QParams(params.scale, zero), codes, quantizer.imported)


def limits(quantizer: Quantizer) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The smallest and the largest number that the codes stand for."""
    params, kind = quantizer.known, quantizer.spec.qtype
    return (kind.qmin - params.zero_point) * params.scale, (kind.qmax - params.zero_point) * params.scale


def over_range(quantizer: Quantizer, spec: QuantSpec) -> Quantizer:
    """A quantizer of `spec`, per tensor, over the range of another one."""
    low, high = limits(quantizer)
    params = qparams_from_range(low.min(), high.max(), spec.qtype, spec.symmetric)
    return Quantizer(spec, params, imported=quantizer.imported)


def own_scheme(model: Model, offered: Sequence[str]) -> str:
    """The name of the scheme, one of `offered`, that a quantized model is in: by the codes of its activations, or of its weights
    where it has no others."""
    copy = model.clone()
    spell_qdq(copy)
    graph = copy.graph
    quantized = {a.dtype for n in graph if is_op(n, QUANTIZE) and not is_const(n.inputs[0]) and (a := affine(n)) is not None}
    stored = {a.dtype for n, _ in constants(graph) if (a := affine(n)) is not None and a.dtype != ir.DataType.INT32}
    operators = {n.op_type for n in graph}
    name = "w8a8"
    if FP4_DYNAMIC in operators or MXFP8_DYNAMIC in operators:
        name = "nvfp4" if FP4_DYNAMIC in operators else "mxfp8"
    elif ir.DataType.FLOAT8E4M3FN in (quantized or stored):
        name = "fp8"
    elif not quantized and stored <= {ir.DataType.INT4, ir.DataType.UINT4} and stored:
        name = "w4a16"
    return name if name in offered else "w8a8"
