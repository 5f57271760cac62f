"""rotate: Hadamard rotations of the residual stream, the attention values and the MLP's hidden layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe import Probe, Rows, RowsStat
from qcompile.calib.observe.change import FOLD_ROWS, Changes
from qcompile.ir.edit import add_constant, insert_after, new_node, redirect, set_constant
from qcompile.ir.model import Model
from qcompile.ir.notes import keep_float
from qcompile.ir.ops import const_array
from qcompile.passes.equivalent.rotate.branch_scale import fold_branch_scales
from qcompile.passes.equivalent.rotate.rms_norm import to_rms
from qcompile.passes.equivalent.rotate.rotation import Reading, proxy_error, stream_rotation
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult
from qcompile.quant.hadamard import block_order, klt_rotation, rotation
from qcompile.rewrite.linear import absorb_shift, like, map_constant, map_inputs, map_outputs, scale_inputs, weight_of
from qcompile.structure import Linear, Mlp, Norm, VProjection, find_mlps, find_v_projections
from qcompile.structure.core import label, names_between
from qcompile.structure.region import Region, find_regions

F64 = NDArray[np.float64]
_BLOCK = 128
_SMALLEST = 4
_SCORED_ROWS = 128


@dataclass(frozen=True)
class Rotate(Pass):
    """Spread outliers over all channels: the residual stream x becomes x R, folded into every weight that writes or reads it.

    before: ... W_out -> + -> LayerNorm(g, b) -> W_in           x = the stream, z = the input of the MLP's second linear
    after:  ... W_out R -> + -> LayerNorm(1, 0) -> R^T diag(g) W_in, c + b W_in
    r1: the stream (QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406): embeddings, positions, class token, patch
    convolution and output projections take R, what reads the norms takes R^T.  RMS(x R) = RMS(x) R for every orthogonal R;
    for a LayerNorm R also keeps the mean, R 1 = 1, so the operator stays as it is.  mean=fold: all writers give up their mean
    over the channels, LayerNorm becomes RMSNorm and R is any rotation (SliceGPT, arXiv:2401.15024); never for an RMSNorm.
    r2: W_v R2 and R2^T W_o in each head, biases included.  r4=block: Reshape -> MatMul [b, b] -> Reshape in front of the
    second MLP linear, which takes the inverse: a small cost at run time.
    kind=klt: the eigenvectors of the second moment of the stream, of each head's values and of the hidden blocks first: equal
    energy in all channels (MambaQuant, arXiv:2501.13484).  search: that many draws of r1; the one with the least quantization
    error of the reading layers on calibration rows is kept.  Folded in float64.
    Exact in float on every target: r1 and r2 without a new node, r4 and mean=fold with some.
    Refused: post-norm blocks (BERT), adaLN, a nonlinearity on the stream, the stream as graph output.
    """

    name = "rotate"
    kind = Kind.EQUIVALENT
    r1: Annotated[bool, "rotate the residual stream (free)"] = True
    r2: Annotated[bool, "rotate the values of each attention head (free)"] = True
    r4: Annotated[Literal["none", "block"], "rotate the MLP's hidden layer while it runs, in blocks of 128 channels"] = "none"
    kind_: Annotated[Literal["hadamard", "klt"], "random Hadamard, or eigenvectors of calibration data first"] = "hadamard"
    search: Annotated[int, "draws to choose the best of"] = 1
    mean: Annotated[Literal["keep", "fold"], "rotate around the mean of a LayerNorm, or fold it into the writers"] = "keep"
    seed: Annotated[int, "of the random signs; added to --seed"] = 0

    def __post_init__(self) -> None:
        self.check_range("search", 1, 1000)

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """Rows of what is rotated, where the rotation depends on data."""
        if self.r1 and self._measures():
            for region in find_regions(model.graph):
                yield from (_probe(n.norm.input) for n in region.norms)
        if self.kind_ == "klt":
            values = (site.linear for site in find_v_projections(model.graph) if self.r2)
            yield from (_probe(linear.output) for linear in values if linear.channel_axis == -1)
            yield from (_probe(mlp.fc2.input) for mlp in find_mlps(model.graph) if self.r4 == "block")

    def moves(self, model: Model, ctx: PassContext) -> Iterable[str]:
        """The stream, what its norms make, the values, and what stands in front of a branch's scale."""
        for region in find_regions(model.graph) if self.r1 else ():
            yield from _names(region)
        for site in find_v_projections(model.graph) if self.r2 else ():
            yield from names_between([site.linear.node], site.out.node)
        for mlp in find_mlps(model.graph) if self.r4 == "block" else ():
            yield str(mlp.fc2.input.name)

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Rotate every stream, head and hidden layer that allows it; remark on the others."""
        changes, rng = Changes(), np.random.default_rng([ctx.seed, self.seed])
        done = self.r1 and self._streams(model, ctx, rng, changes)
        done = (self.r2 and self._values(model, ctx, rng, changes)) or done
        done = (self.r4 == "block" and self._hidden(model, ctx, rng)) or done
        return PassResult(done, changes)

    def _measures(self) -> bool:
        return self.kind_ == "klt" or self.search > 1

    # ---- r1 -------------------------------------------------------------------------------------------------------

    def _streams(self, model: Model, ctx: PassContext, rng: np.random.Generator, changes: Changes) -> bool:
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
            changes.move(list(_names(region)))
            changes.move(self._rotate(model.graph, region, ctx, rng))
            done = True
        return done

    def _rotate(self, graph: ir.Graph, region: Region, ctx: PassContext, rng: np.random.Generator) -> set[str]:
        readings = _readings(region, ctx) if self._measures() else []
        folds = self.mean == "fold" and region.has_mean
        reason = _fold_refusal(region) if folds else None
        if reason:
            ctx.remarks.note(str(region.anchor.name), f"the mean is kept: {reason}")
        folds = folds and reason is None
        r, numbers = self._chosen(region, readings, region.has_mean and not folds, ctx, rng)
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
        self, region: Region, readings: list[Reading], keep_mean: bool, ctx: PassContext, rng: np.random.Generator
    ) -> tuple[F64, dict[str, float]]:
        moment = sum((_moment(x.rows) for x in readings), np.zeros(())) if self.kind_ == "klt" else None
        draws = [stream_rotation(region.channels, rng, keep_mean, moment) for _ in range(self.search)]
        if len(draws) == 1:
            return draws[0], {}
        types = (ctx.scheme.activation, ctx.scheme.weight)
        errors = [proxy_error(readings, r, types) for r in draws]
        best = int(np.argmin(errors))
        gain = 10 * float(np.log10(np.median(errors) / max(errors[best], 1e-30)))
        return draws[best], {"draws": float(len(draws)), "gain_over_median_db": round(gain, 2)}

    # ---- r2 and r4 ------------------------------------------------------------------------------------------------

    def _values(self, model: Model, ctx: PassContext, rng: np.random.Generator, changes: Changes) -> bool:
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
            _rotate_heads(site, unique, rng, self._rows(site.linear.output, ctx))
            ctx.remarks.applied(
                str(site.attention.pv.name), f"values of {len(unique)} heads of {heads.shape[1]} channels rotated"
            )
            done = True
        return done

    def _hidden(self, model: Model, ctx: PassContext, rng: np.random.Generator) -> bool:
        matches, done = find_mlps(model.graph), False
        for refusal in matches.refused:
            ctx.remarks.missed(str(refusal.node.name), f"hidden layer not rotated: {refusal.reason}")
        for mlp in matches:
            block = block_order(mlp.fc2.in_channels, _BLOCK)
            reason = ctx.selection.excluded(mlp.fc2.node) or _hidden_refusal(mlp, block)
            if reason:
                ctx.remarks.missed(str(mlp.fc2.node.name), f"hidden layer not rotated: {reason}")
                continue
            rows = self._rows(mlp.fc2.input, ctx)
            r = rotation(block, rng, block) if rows is None else klt_rotation(_moment(rows.reshape(-1, block)), rng)
            _rotate_online(model.graph, mlp.fc2, r)
            ctx.remarks.applied(str(mlp.fc2.node.name), f"hidden layer rotated in blocks of {block}", block=block)
            done = True
        return done

    def _rows(self, value: ir.Value, ctx: PassContext) -> F64 | None:
        """Sampled rows of a tensor for kind=klt; None for a random Hadamard."""
        stat = ctx.told.get(_probe(value)) if self.kind_ == "klt" else None
        return stat.rows.astype(np.float64) if stat is not None and len(stat.rows) else None


def _moment(rows: F64) -> F64:
    return rows.T @ rows


def _fold_refusal(region: Region) -> str | None:
    """Why the stream must keep its mean."""
    if region.readers:
        return f"{label(region.readers[0].node)} reads the stream without a norm"
    rms = next((n.norm for n in region.norms if n.norm.kind == "rms"), None)
    return f"{label(rms.node)} is an RMSNorm" if rms is not None else None


def _probe(value: ir.Value) -> Probe[RowsStat]:
    return Rows(FOLD_ROWS).of(value)


def _linears(region: Region) -> list[Linear]:
    return list(dict.fromkeys([*region.writers, *region.readers, *(x for n in region.norms for x in n.linears)]))


def _names(region: Region) -> Iterable[str]:
    """Tensors whose values a rotation of the stream moves."""
    yield from (str(v.name) for v in region.values)
    for linear in region.writers:
        yield from (str(linear.node.outputs[0].name), str(linear.output.name))
    for n in region.norms:
        yield from (str(v.name) for node in (*n.norm.nodes, *n.path) for v in node.outputs)


def _readings(region: Region, ctx: PassContext) -> list[Reading]:
    """What each norm's readers see: normalised rows without gain, and the weights with it."""
    found: list[Reading] = []
    for n in region.norms:
        stat = ctx.told.get(_probe(n.norm.input))
        if stat is None or not len(stat.rows):
            continue
        x = stat.rows[:: max(1, len(stat.rows) // _SCORED_ROWS)].astype(np.float64)
        x = x - x.mean(1, keepdims=True) if n.norm.kind != "rms" else x
        rows = x / np.sqrt(np.square(x).mean(1, keepdims=True) + n.norm.eps)
        gain = _vector(n.norm.gamma, region.channels, 1.0)
        weights = [weight_of(linear).reshape(region.channels, -1) for linear in n.linears]
        found.append(Reading(rows, gain[:, None] * np.concatenate(weights, axis=1)))
    return found


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


def _rotate_heads(site: VProjection, heads: NDArray[np.int64], rng: np.random.Generator, values: F64 | None) -> None:
    """One rotation for each value head: columns of W_v and its bias, and the rows of W_o that read them (once a query head)."""
    outputs, inputs = np.eye(site.linear.out_channels), np.eye(site.out.in_channels)
    for columns in heads:
        r = rotation(len(columns), rng) if values is None else klt_rotation(_moment(values[:, columns]), rng)
        outputs[np.ix_(columns, columns)] = r
        rows = np.stack([np.flatnonzero(site.columns == c) for c in columns])
        for group in rows.T:
            inputs[np.ix_(group, group)] = r.T
    map_outputs(site.linear, outputs)
    map_inputs(site.out, inputs)


def _hidden_refusal(mlp: Mlp, block: int) -> str | None:
    if mlp.fc2.channel_axis != -1:
        return "it is a convolution"
    if block < 16:
        return f"no Hadamard block of 16 or more divides its {mlp.fc2.in_channels} channels"
    return "its rank is unknown: run canonicalize" if mlp.fc2.input.shape is None else None


def _rotate_online(graph: ir.Graph, linear: Linear, r: F64) -> None:
    """Reshape [.., n/b, b] -> MatMul [b, b] -> Reshape back in front of `linear`, whose weight takes the inverse."""
    value, blocks = linear.input, linear.in_channels // len(r)
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    rank = len(value.shape or ())
    split = add_constant(graph, f"{value.name}_blocks", np.array([0] * (rank - 1) + [blocks, len(r)], np.int64))
    joined = add_constant(graph, f"{value.name}_joined", np.array([0] * (rank - 1) + [-1], np.int64))
    matrix = add_constant(graph, f"{value.name}_rotation", r.astype(dtype))
    cut = new_node(graph, "Reshape", [value, split], name=f"{linear.node.name}_blocks")
    product = new_node(graph, "MatMul", [cut.outputs[0], matrix], name=f"{linear.node.name}_rotation")
    back = new_node(graph, "Reshape", [product.outputs[0], joined], name=f"{linear.node.name}_joined", like=value)
    for out in (cut.outputs[0], product.outputs[0]):
        out.type = value.type
        out.shape = ir.Shape([*list(value.shape or ())[:-1], blocks, len(r)])
    keep_float(product, "an online rotation")
    insert_after(graph, value, cut, product, back)
    redirect(value, back.outputs[0], [(linear.node, linear.input_slot)])
    exact = r.astype(dtype).astype(np.float64)
    inverse: F64 = np.asarray(np.linalg.inv(exact), np.float64)
    map_inputs(linear, np.kron(np.eye(blocks), inverse).astype(np.float64))
