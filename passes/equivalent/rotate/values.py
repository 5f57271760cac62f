"""r2: the values of each attention head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.observe.change import Changes
from qcompile.ir.model import Model
from qcompile.passes.equivalent.rotate.rows import F64, moment, rows_of
from qcompile.pipeline.base import PassContext
from qcompile.quant.hadamard import block_order, klt_rotation, rotation
from qcompile.rewrite.linear import map_inputs, map_outputs
from qcompile.structure import VProjection, find_v_projections
from qcompile.structure.core import names_between

_SMALLEST = 4


def rotate_values(model: Model, klt: bool, ctx: PassContext, rng: np.random.Generator, changes: Changes) -> bool:
    """Rotate the values of every head that allows it, remark on the others; whether any was changed."""
    matches, done = find_v_projections(model.graph), False
    for refusal in matches.refused:
        ctx.remarks.missed(str(refusal.node.name), f"values not rotated: {refusal.reason}")
    for site in matches:
        heads = site.attention.v.columns
        reason = ctx.selection.any_excluded((site.linear.node, site.out.node))
        reason = reason or (None if heads is not None else "values not rotated: its heads are not known")
        if heads is not None and reason is None and block_order(heads.shape[1]) < _SMALLEST:
            reason = f"no Hadamard block divides its heads of {heads.shape[1]} channels"
        if heads is None or reason:
            ctx.remarks.missed(str(site.attention.pv.name), str(reason))
            continue
        changes.move(list(names_between([site.linear.node], site.out.node)))
        unique = np.unique(heads, axis=0)
        _rotate_heads(site, unique, rng, rows_of(site.linear.output, ctx) if klt else None)
        ctx.remarks.applied(str(site.attention.pv.name), f"values of {len(unique)} heads of {heads.shape[1]} channels rotated")
        done = True
    return done


def _rotate_heads(site: VProjection, heads: NDArray[np.int64], rng: np.random.Generator, values: F64 | None) -> None:
    """One rotation for each value head: columns of W_v and its bias, and the rows of W_o that read them (once a query head)."""
    outputs, inputs = np.eye(site.linear.out_channels), np.eye(site.out.in_channels)
    for columns in heads:
        r = rotation(len(columns), rng) if values is None else klt_rotation(moment(values[:, columns]), rng)
        outputs[np.ix_(columns, columns)] = r
        rows = np.stack([np.flatnonzero(site.columns == c) for c in columns])
        for group in rows.T:
            inputs[np.ix_(group, group)] = r.T
    map_outputs(site.linear, outputs)
    map_inputs(site.out, inputs)
