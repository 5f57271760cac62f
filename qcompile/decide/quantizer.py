"""Quantizer: how one tensor is quantized, and its form as text, which is read and written with model files only."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.quant.affine import dequantize, fake_quant, quantize, storage_dtype
from qcompile.quant.blockformats import block_format
from qcompile.quant.qtype import qtype
from qcompile.quant.spec import Granularity, PerAxis, PerBlock, PerTensor, QParams, QuantSpec

F32 = NDArray[np.float32]
PREFIX = "qcompile.quantize."
"""Of the keys of decisions in a node's notes; the slot follows."""


@dataclass(frozen=True, eq=False)
class Quantizer:
    """How one tensor is quantized; its uses share the object, and one QuantizeLinear comes of it.

    `qparams`: once the scale is known.  `codes`: what a constant becomes, in its shape and `storage_dtype(spec.qtype)`, where
    a pass found a better rounding than to the nearest; then the tensor is (codes - zero_point) scale, with the scale as it is
    stored in the end.  `imported`: read from a quantized model, and chosen anew by no pass.  Never edited in place: another
    quantizer takes its place (`decisions.replace`).

    Raises:
        ValueError: codes without a scale, of another type or outside its range.
    """

    spec: QuantSpec
    qparams: QParams | None = None
    codes: NDArray[Any] | None = None
    imported: bool = False

    def __post_init__(self) -> None:
        if self.codes is None:
            return
        low, high, dtype = self.spec.qtype.qmin, self.spec.qtype.qmax, storage_dtype(self.spec.qtype)
        if self.qparams is None:
            raise ValueError("codes mean nothing without a scale; give qparams with them")
        if self.codes.dtype != dtype:
            raise ValueError(f"codes of {self.spec.qtype.name} are {dtype}, not {self.codes.dtype}; cast them")
        wide = self.codes.astype(np.float32)
        if wide.size and not (wide.min() >= low and wide.max() <= high):
            raise ValueError(f"codes of {self.spec.qtype.name} lie in [{low:g}, {high:g}]; clip them")

    def with_qparams(self, qparams: QParams) -> Quantizer:
        """The same spec with this scale.  Codes go: they round the tensor on the grid of their own scale."""
        return Quantizer(self.spec, qparams)

    def with_codes(self, codes: NDArray[Any]) -> Quantizer:
        """The same scale with a rounding that a pass found."""
        return replace(self, codes=codes)

    def coded(self, x: NDArray[Any], stored: QParams | None = None) -> NDArray[Any]:
        """Codes of the tensor `x`: its own, else the nearest ones.

        `stored`: the scale in the type that the graph holds it in; it rounds to the nearest on that grid, and leaves codes alone.

        Raises:
            ValueError: its codes have another shape.
        """
        if self.codes is None:
            return np.asarray(quantize(x, stored or self.known, self.spec.qtype, self.spec.granularity))
        if self.codes.shape != x.shape:
            raise ValueError(f"codes of shape {self.codes.shape} for a tensor of shape {x.shape}; find them again")
        return self.codes

    def rounded(self, x: F32) -> F32:
        """The values that the tensor `x` becomes, float32."""
        if self.codes is None:
            return fake_quant(x, self.known, self.spec.qtype, self.spec.granularity)
        return dequantize(self.coded(x), self.known, self.spec.granularity)

    @property
    def known(self) -> QParams:
        """The scale, which must be known."""
        assert self.qparams is not None
        return self.qparams

    def equals(self, other: Quantizer) -> bool:
        """Whether both do the same to a tensor."""
        return self is other or (
            self.spec == other.spec and _same_qparams(self.qparams, other.qparams) and _same(self.codes, other.codes)
        )

    def label(self, value: ir.Value) -> str:
        """A short name for people: the tensor, then what tells this quantizer from another of the same tensor."""
        params, form = self.qparams, block_format(self.spec)
        if value.const_value is not None or params is None or params.scale.ndim:
            return f"{value.name}:{self.spec.granularity}"
        if form is not None and form.activation is None:
            return f"{value.name}:{form.name}"
        scale = f"{float(params.scale):.9g}"
        if self.spec.qtype.companded:
            return ":".join([str(value.name), self.spec.qtype.name, scale, *(f"{x:.9g}" for x in params.curve)])
        return ":".join([str(value.name), scale, str(int(params.zero_point)), *([form.name] if form else [])])

    def to_text(self, node: ir.Node, key: str) -> str:
        """The decision `key` of `node` as JSON; arrays in base64."""
        s, params = self.spec, self.qparams
        doc: dict[str, Any] = {"type": s.qtype.name, "granularity": _granularity_text(s.granularity)}
        doc |= {"id": self.label(value_at(node, int(key.removeprefix(PREFIX)))), "symmetric": s.symmetric}
        if params is not None:
            doc |= {"shape": list(params.scale.shape), "scale": _pack(params.scale, "<f8")}
            doc |= {"zero_point": _pack(params.zero_point, "<i8")}
            doc |= {} if params.tensor_scale is None else {"tensor_scale": params.tensor_scale}
            doc |= {"curve": params.curve} if params.curve else {}
        if self.codes is not None:
            doc |= {"codes_shape": list(self.codes.shape), "codes": _pack(self.codes)}
        doc |= {"imported": True} if self.imported else {}
        return json.dumps(doc, separators=(",", ":"))


def from_text(text: str) -> Quantizer:
    """What `Quantizer.to_text` wrote; keys that it does not know (older files have some) are ignored."""
    doc = json.loads(text)
    spec = QuantSpec(qtype(doc["type"]), _granularity(doc["granularity"]), doc["symmetric"])
    if "scale" not in doc:
        return Quantizer(spec)
    scale, zero_point = (_unpack(doc[k], np.dtype(t), doc["shape"]) for k, t in (("scale", "<f8"), ("zero_point", "<i8")))
    params = QParams(scale, zero_point, doc.get("tensor_scale"), tuple(doc.get("curve", ())))
    codes = _unpack(doc["codes"], storage_dtype(spec.qtype), doc["codes_shape"]) if "codes" in doc else None
    return Quantizer(spec, params, codes, bool(doc.get("imported")))


def value_at(node: ir.Node, slot: int) -> ir.Value:
    """The tensor that the key (node, slot) speaks of."""
    value = node.inputs[slot] if slot >= 0 else node.outputs[~slot]
    assert value is not None
    return value


def _same(a: NDArray[Any] | None, b: NDArray[Any] | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def _same_qparams(a: QParams | None, b: QParams | None) -> bool:
    if a is None or b is None:
        return a is b
    same = _same(a.scale, b.scale) and _same(a.zero_point, b.zero_point)
    return same and (a.tensor_scale, a.curve) == (b.tensor_scale, b.curve)


def _pack(array: NDArray[Any], dtype: str | None = None) -> str:
    return base64.b64encode((array if dtype is None else array.astype(dtype)).tobytes()).decode()


def _unpack(text: str, dtype: np.dtype, shape: list[int]) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), dtype).reshape(shape)


def _granularity_text(g: Granularity) -> str:
    match g:
        case PerTensor():
            return "tensor"
        case PerAxis(axis):
            return f"axis:{axis}"
        case PerBlock(axis, size):
            return f"block:{axis}:{size}"


def _granularity(text: str) -> Granularity:
    kind, *numbers = text.split(":")
    if kind == "tensor":
        return PerTensor()
    return PerAxis(int(numbers[0])) if kind == "axis" else PerBlock(int(numbers[0]), int(numbers[1]))
