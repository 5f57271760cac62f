"""Softmax in integers: 2^x by a table of 256 entries and a shift, one division a row."""

from __future__ import annotations

import math

import numpy as np

from qcompile.ir.ops import int_attr
from qcompile.passes.lower.integer.context import EXP_FRACTION_BITS, SCORES, Scene
from qcompile.passes.lower.integer.emit import INT32, INT64, UINT64, Fixed
from qcompile.passes.lower.integer.requant import codes, shift, stored
from qcompile.target.integer.plan import Step

_ONE_BITS = 30
_STEPS = 1 << EXP_FRACTION_BITS
_FARTHEST = _STEPS * (_ONE_BITS + 1) - 1
_RECIPROCAL_BITS = 60


def softmax(scene: Scene, step: Step) -> Fixed:
    """p = 2^-d / sum 2^-d with d = (max - x) log2 e in 1/256: table(d mod 256) >> (d div 256), then e * floor(G / sum).

    The largest element contributes exactly 2^30, so the row's sum is at least that and the quotient at most G / 2^30; G = 2^k /
    s_out folds the output's scale in.  One rounding, half up, makes the codes: rows do not lose mass as flooring would.
    """
    em, node = scene.em, step.node
    x = codes(em, node.inputs[0], SCORES)
    axis = em.const(np.asarray([int_attr(node, "axis", -1)]), INT64)
    top = em.emit("ReduceMax", [x.value, axis], INT32, {"keepdims": 1})
    below = em.emit("Sub", [top, x.value], INT32)
    distance = em.cast(em.emit("Clip", [below, em.const(0, INT32), em.const(_FARTHEST, INT32)], INT32), INT64)
    whole = em.emit("Div", [distance, em.const(_STEPS, INT64)], INT64)
    part = em.emit("Sub", [distance, em.emit("Mul", [whole, em.const(_STEPS, INT64)], INT64)], INT64)
    powers = np.rint(2.0 ** (_ONE_BITS - np.arange(_STEPS) / _STEPS)).astype(np.int64)
    power = em.emit("Gather", [em.const(powers, UINT64), part], UINT64, {"axis": 0})
    shifted = em.emit("BitShift", [power, em.cast(whole, UINT64)], UINT64, {"direction": "RIGHT"})
    exponential = em.cast(shifted, INT64)
    total = em.emit("ReduceSum", [exponential, axis], INT64, {"keepdims": 1})
    held = em.cast(em.emit("Max", [em.cast(total, UINT64), em.const(1 << _ONE_BITS, UINT64)], UINT64), INT64)
    fmt = scene.stored_format(step.output)
    e = min(_RECIPROCAL_BITS + math.floor(math.log2(fmt.scale)), _RECIPROCAL_BITS)
    factor = em.emit("Div", [em.const(round(2.0**e / fmt.scale), INT64), held], INT64)
    product = em.emit("Mul", [exponential, factor], INT64)
    return stored(em, shift(em, product, np.asarray(e)), fmt, 1 / fmt.scale + 2)
