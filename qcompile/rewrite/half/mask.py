"""Attention masks: huge negative constants that only ever reach a Softmax.

Exporters write float32's minimum.  Rounded to float16 it would be -inf, sums of masks too, and a row of nothing but -inf is
NaN; kept in float32 it would tear the attention apart.  A mask is therefore set to a quarter of the type's range, where
exp is 0 all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompile.ir.masks import mask_region, masked_tensors
from qcompile.ir.ops import is_op
from qcompile.rewrite.half.types import FLOAT

_POSITIVE, _NEGATIVE = 256.0, -1000.0


@dataclass
class Masks:
    """`constants`: values (and ConstantOfShape outputs) that end at the bound; `reached`: names of tensors that hold a mask;
    `scaled`: outputs of Mul among them, where the sign of the other factor matters."""

    constants: set[ir.Value] = field(default_factory=set[ir.Value])
    reached: set[str] = field(default_factory=set[str])
    scaled: set[ir.Value] = field(default_factory=set[ir.Value])


def find_masks(graph: ir.Graph) -> Masks:
    """All masks of the main graph."""
    masks = Masks(reached=set(masked_tensors(graph)))
    for value in _candidates(graph):
        region = mask_region(value)
        if region is not None:
            masks.constants.add(value)
            masks.reached |= {str(v.name) for v in region}
            masks.scaled |= {v for v in region if is_op(v.producer(), "Mul")}
    return masks


def _candidates(graph: ir.Graph) -> Iterator[ir.Value]:
    for value in graph.initializers.values():
        if value.dtype == FLOAT and value.const_value is not None and value.const_value.size:
            array = value.const_value.numpy()
            if array.min() <= _NEGATIVE and array.max() <= _POSITIVE:
                yield value
    for node in graph:
        if is_op(node, "ConstantOfShape") and filled(node) <= _NEGATIVE:
            yield node.outputs[0]


def lowest(value: ir.Value) -> float:
    """The most negative number of a mask."""
    producer = value.producer()
    if producer is not None:
        return filled(producer)
    return float(value.const_value.numpy().min()) if value.const_value is not None else 0.0


def filled(node: ir.Node) -> float:
    """What a ConstantOfShape is filled with."""
    attribute = node.attributes.get("value")
    return float(np.asarray(attribute.as_tensor().numpy()).reshape(-1)[0]) if attribute is not None else 0.0
