"""Quantization decisions: what is quantized and how, kept in node metadata until insert-qdq makes it real.

A decision's key is (node, slot): slot i >= 0 is input i, slot ~i (negative) is output i.  Uses of one tensor
with equal specs share a `quantizer`, which becomes one QuantizeLinear.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.quant.qtype import qtype
from qcompile.quant.spec import Granularity, PerAxis, PerBlock, PerTensor, QParams, QuantSpec, RangeMethod

PREFIX = "qcompile.quantize."


@dataclass(frozen=True)
class Decision:
    """One quantized use: the spec, the shared quantizer's id, and the scale once it is known."""

    spec: QuantSpec
    quantizer: str
    qparams: QParams | None = None

    def with_qparams(self, qparams: QParams) -> Decision:
        """The same decision with its scale known."""
        return replace(self, qparams=qparams)


def decide(node: ir.Node, slot: int, decision: Decision) -> None:
    """Record (or replace) the decision for `slot` of `node`."""
    node.metadata_props[f"{PREFIX}{slot}"] = _dump(decision)


def undecide(node: ir.Node, slot: int) -> None:
    """Forget the decision for `slot` of `node`, if any."""
    node.metadata_props.pop(f"{PREFIX}{slot}", None)


def decision(node: ir.Node, slot: int) -> Decision | None:
    """The decision for `slot` of `node`."""
    text = node.metadata_props.get(f"{PREFIX}{slot}")
    return None if text is None else _load(text)


def decisions(graph: ir.Graph) -> Iterator[tuple[ir.Node, int, Decision]]:
    """All decisions of `graph`, in node order."""
    for node in graph:
        for key in [k for k in node.metadata_props if k.startswith(PREFIX)]:
            yield node, int(key[len(PREFIX) :]), _load(node.metadata_props[key])


def clear_decisions(graph: ir.Graph) -> None:
    """Remove every decision (once they are materialised)."""
    for node, slot, _ in list(decisions(graph)):
        undecide(node, slot)


def value_at(node: ir.Node, slot: int) -> ir.Value:
    """The tensor that the key (node, slot) speaks of."""
    value = node.inputs[slot] if slot >= 0 else node.outputs[~slot]
    assert value is not None
    return value


def _dump(d: Decision) -> str:
    s = d.spec
    doc: dict[str, Any] = {"type": s.qtype.name, "granularity": _granularity_text(s.granularity), "id": d.quantizer}
    doc |= {"symmetric": s.symmetric, "method": s.method}
    if d.qparams is not None:
        scale, zero_point = d.qparams.scale, d.qparams.zero_point
        doc |= {"shape": list(scale.shape), "scale": _pack(scale, "<f8"), "zero_point": _pack(zero_point, "<i8")}
        doc |= {} if d.qparams.tensor_scale is None else {"tensor_scale": d.qparams.tensor_scale}
        doc |= {"curve": d.qparams.curve} if d.qparams.curve else {}
    return json.dumps(doc, separators=(",", ":"))


def _load(text: str) -> Decision:
    doc = json.loads(text)
    spec = QuantSpec(qtype(doc["type"]), _granularity(doc["granularity"]), doc["symmetric"], cast(RangeMethod, doc["method"]))
    if "scale" not in doc:
        return Decision(spec, doc["id"])
    shape = doc["shape"]
    scale, zero_point = _unpack(doc["scale"], "<f8", shape), _unpack(doc["zero_point"], "<i8", shape)
    return Decision(spec, doc["id"], QParams(scale, zero_point, doc.get("tensor_scale"), tuple(doc.get("curve", ()))))


def _pack(array: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(array.astype(dtype).tobytes()).decode()


def _unpack(text: str, dtype: str, shape: list[int]) -> NDArray[Any]:
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
