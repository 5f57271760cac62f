"""r1: the residual stream."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.calib.observe.change import Changes
from qcompile.ir.edit import set_constant
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array
from qcompile.passes.equivalent.rotate.branch_scale import fold_branch_scales
from qcompile.passes.equivalent.rotate.rms_norm import to_rms
from qcompile.passes.equivalent.rotate.rotation import Reading, proxy_error, stream_rotation
from qcompile.passes.equivalent.rotate.rows import F64, moment, rows_of
from qcompile.pipeline.base import PassContext
from qcompile.rewrite.linear import absorb_shift, like, map_constant, map_inputs, map_outputs, scale_inputs, weight_of
from qcompile.structure import Linear, Norm
from qcompile.structure.core import label
from qcompile.structure.region import Region, find_regions

_SCORED_ROWS = 128


@dataclass(frozen=True)
class Wanted:
    """Which rotation: the best of `draws`, behind the eigenvectors of the stream (`klt`), the mean folded into the writers."""

    draws: int
    klt: bool
    fold: bool

    @property
    def measures(self) -> bool:
        """Whether the choice depends on rows of the stream."""
        return self.klt or self.draws > 1


def rotate_streams(model: Model, wanted: Wanted, ctx: PassContext, rng: np.random.Generator, changes: Changes) -> bool:
    """Rotate every stream that allows it, remark on the others; whether any was changed."""
    scaled = fold_branch_scales(model.graph, ctx.selection, ctx.remarks)
    changes.move(scaled)
    matches, done = find_regions(model.graph), bool(scaled)
    for refusal in matches.refused:
        ctx.remarks.missed(str(refusal.node.name), refusal.reason)
    for region in matches:
        reason = ctx.selection.any_excluded(x.node for x in _linears(region))
        if reason:
            ctx.remarks.missed(str(region.anchor.name), f"{reason}; a stream is rotated whole or not at all")
            continue
        changes.move(list(names(region)))
        changes.move(_rotate(model.graph, region, wanted, ctx, rng))
        done = True
    return done


def names(region: Region) -> Iterable[str]:
    """Tensors whose values a rotation of the stream moves."""
    yield from (str(v.name) for v in region.values)
    for linear in region.writers:
        yield from (str(linear.node.outputs[0].name), str(linear.output.name))
    for n in region.norms:
        yield from (str(v.name) for node in (*n.norm.nodes, *n.path) for v in node.outputs)


def _rotate(graph: ir.Graph, region: Region, wanted: Wanted, ctx: PassContext, rng: np.random.Generator) -> set[str]:
    readings = _readings(region, ctx) if wanted.measures else []
    folds = wanted.fold and region.has_mean
    reason = _fold_refusal(region) if folds else None
    if reason:
        ctx.remarks.note(str(region.anchor.name), f"the mean is kept: {reason}")
    folds = folds and reason is None
    r, numbers = _chosen(region, readings, region.has_mean and not folds, wanted, ctx, rng)
    moved = {name for n in region.norms for name in _free_norm(graph, n.norm, n.linears)}
    for linear in dict.fromkeys([*(x for n in region.norms for x in n.linears), *region.readers]):
        map_inputs(linear, r.T)
    written = r - r.mean(0) if folds else r
    for linear in region.writers:
        map_outputs(linear, written)
    for c in region.constants:
        map_constant(c.node, c.slot, c.axis, written)
    for n in region.norms if folds else ():
        to_rms(graph, n.norm)
    writers = f"{len(region.writers)} linears and {len(region.constants)} constants write it"
    what = f"stream of {region.channels} channels rotated: {writers}, {len(region.norms)} norms read it"
    what += ", the mean is folded and they are RMSNorms now" if folds else ""
    ctx.remarks.applied(str(region.anchor.name), what, **numbers)
    return moved


def _chosen(
    region: Region, readings: list[Reading], keep_mean: bool, wanted: Wanted, ctx: PassContext, rng: np.random.Generator
) -> tuple[F64, dict[str, float]]:
    second = sum((moment(x.rows) for x in readings), np.zeros(())) if wanted.klt else None
    draws = [stream_rotation(region.channels, rng, keep_mean, second) for _ in range(wanted.draws)]
    if len(draws) == 1:
        return draws[0], {}
    types = (ctx.scheme.activation, ctx.scheme.weight)
    errors = [proxy_error(readings, r, types) for r in draws]
    best = int(np.argmin(errors))
    gain = 10 * float(np.log10(np.median(errors) / max(errors[best], 1e-30)))
    return draws[best], {"draws": float(len(draws)), "gain_over_median_db": round(gain, 2)}


def _fold_refusal(region: Region) -> str | None:
    """Why the stream must keep its mean."""
    if region.readers:
        return f"{label(region.readers[0].node)} reads the stream without a norm"
    rms = next((n.norm for n in region.norms if n.norm.kind == "rms"), None)
    return f"{label(rms.node)} is an RMSNorm" if rms is not None else None


def _linears(region: Region) -> list[Linear]:
    return list(dict.fromkeys([*region.writers, *region.readers, *(x for n in region.norms for x in n.linears)]))


def _readings(region: Region, ctx: PassContext) -> list[Reading]:
    """What each norm's readers see: normalised rows without gain, and the weights with it."""
    readings: list[Reading] = []
    for n in region.norms:
        found = rows_of(n.norm.input, ctx)
        if found is None:
            continue
        x = found[:: max(1, len(found) // _SCORED_ROWS)]
        x = x - x.mean(1, keepdims=True) if n.norm.kind != "rms" else x
        rows = x / np.sqrt(np.square(x).mean(1, keepdims=True) + n.norm.eps)
        gain = _vector(n.norm.gamma, region.channels, 1.0)
        weights = [weight_of(linear).reshape(region.channels, -1) for linear in n.linears]
        readings.append(Reading(rows, gain[:, None] * np.concatenate(weights, axis=1)))
    return readings


def _vector(value: ir.Value | None, channels: int, default: float) -> F64:
    array = const_array(value)
    return np.broadcast_to(np.asarray(default if array is None else array.astype(np.float64).reshape(-1)), (channels,))


def _free_norm(graph: ir.Graph, norm: Norm, linears: tuple[Linear, ...]) -> set[str]:
    """norm(x; g, b) W + c = norm(x; 1, 0) diag(g) W + c + b W; returns the tensors in front of biases, which move."""
    moved = set[str]()
    gamma, beta = const_array(norm.gamma), const_array(norm.beta)
    for linear in linears:
        if beta is not None and np.any(beta):
            shift = _vector(norm.beta, linear.in_channels, 0.0)
            moved |= absorb_shift(graph, linear, shift)
        if gamma is not None:
            scale_inputs(linear, _vector(norm.gamma, linear.in_channels, 1.0))
    for site, array, value in ((norm.gamma_site, gamma, 1.0), (norm.beta_site, beta, 0.0)):
        if array is not None and site is not None:
            set_constant(*site, like(array, np.full(array.shape, value)))
    return moved
