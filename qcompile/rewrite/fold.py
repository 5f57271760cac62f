"""The one affine fold behind smooth and repq: x' = (x - t) / r per channel, undone in the linears that read x.

norm:   gamma' = gamma / r,  beta' = (beta - t) / r          (exact, no new node)
value:  columns of the value projection / s, rows of the output projection * s
hidden: a gated MLP's up projection, a ReLU MLP's fc1 / s; behind GELU one Mul by 1 / s (and Sub t) is inserted
linear: W' = diag(r) W,  c' = c + t W
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe.change import AffineMap, Changes
from qcompile.ir.edit import add_constant, new_node, set_constant, splice_after
from qcompile.ir.notes import mark_folded
from qcompile.ir.ops import const_array
from qcompile.rewrite.linear import absorb_shift, divide_outputs, like, scale_inputs, weight_of
from qcompile.structure import (
    Linear,
    Matches,
    Mlp,
    NormToLinears,
    VProjection,
    find_mlps,
    find_norm_to_linears,
    find_v_projections,
)
from qcompile.structure.core import names_between

F64 = NDArray[np.float64]
SiteKind = Literal["norm", "value", "hidden"]


@dataclass(frozen=True, eq=False)
class FoldSite:
    """One tensor [..., C] whose channels may be rescaled: `tensor` as its readers `linears` see it.

    `channels[i]` is the channel of r that row i of the linears' weights belongs to (grouped-query heads repeat).
    """

    kind: SiteKind
    tensor: ir.Value
    linears: tuple[Linear, ...]
    anchor: ir.Node
    match: NormToLinears | VProjection | Mlp
    shift_refusal: str | None
    free: bool = True
    channels: NDArray[np.int64] | None = None

    @property
    def moved(self) -> Iterator[str]:
        """Names of the tensors whose values change."""
        return _moved(self)

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of the tensors that the linears read."""
        return tuple(dict.fromkeys(str(x.input.name) for x in self.linears))

    def weight_rows(self) -> F64:
        """Weights of all linears side by side, [C_in, sum of outputs], float64."""
        return np.concatenate([weight_of(x).reshape(x.in_channels, -1) for x in self.linears], axis=1)


def norm_sites(graph: ir.Graph) -> Matches[FoldSite]:
    """Norm -> linears."""
    matches = find_norm_to_linears(graph)
    found = (m for m in matches if m.linears and all(x.channel_axis == -1 for x in m.linears))
    sites = tuple(FoldSite("norm", m.linears[0].input, m.linears, m.norm.node, m, m.shift_refusal) for m in found)
    return Matches(sites, matches.refused)


def value_sites(graph: ir.Graph) -> Matches[FoldSite]:
    """Value projection -> output projection, through attention."""
    matches = find_v_projections(graph)
    sites = (FoldSite("value", m.out.input, (m.out,), m.attention.pv, m, m.shift_refusal, channels=m.columns) for m in matches)
    return Matches(tuple(sites), matches.refused)


def hidden_sites(graph: ir.Graph) -> Matches[FoldSite]:
    """The hidden layer of an MLP -> fc2."""
    matches = find_mlps(graph)
    sites = (
        FoldSite("hidden", m.fc2.input, (m.fc2,), m.fc2.node, m, m.shift_refusal, free=_absorber(m) is not None)
        for m in matches
        if m.fc2.channel_axis == -1
    )
    return Matches(tuple(sites), matches.refused)


def fold(graph: ir.Graph, site: FoldSite, r: F64, t: F64, changes: Changes) -> None:
    """Rewrite one site: r [C] nonzero, t [C] (zeros where the site refuses a shift)."""
    moved = set(_moved(site))
    match site.match:
        case NormToLinears():
            _fold_norm(graph, site.match, r, t)
            if not any(n.op_type == "Transpose" for n in site.match.path):
                changes.map([str(site.match.norm.output.name)], AffineMap(r, t))
        case VProjection():
            _fold_value(site.match, r, changes)
        case Mlp():
            moved |= _fold_hidden(graph, site, site.match, r, t, changes)
    rows = r if site.channels is None else r[site.channels]
    for linear in site.linears:
        moved |= _fold_linear(graph, linear, rows, t)
        mark_folded(linear.node)
    if site.kind != "hidden" or site.free:
        changes.map(site.readers, AffineMap(rows, t))
    changes.move(moved)


def _fold_norm(graph: ir.Graph, m: NormToLinears, r: F64, t: F64) -> None:
    norm = m.norm
    if norm.gamma_site is None:
        _append_affine(graph, norm.output, 1 / r, -t / r)
        return
    gamma = const_array(norm.gamma)
    assert gamma is not None
    node, slot = norm.gamma_site
    set_constant(node, slot, like(gamma, np.broadcast_to(gamma.astype(np.float64).reshape(-1), r.shape) / r))
    beta = const_array(norm.beta)
    if beta is not None and norm.beta_site is not None:
        wide = np.broadcast_to(beta.astype(np.float64).reshape(-1), r.shape)
        set_constant(norm.beta_site[0], norm.beta_site[1], like(beta, (wide - t) / r))
    elif np.any(t):
        _make_beta(graph, m, -t / r, gamma.dtype)


def _make_beta(graph: ir.Graph, m: NormToLinears, beta: F64, dtype: np.dtype) -> None:
    site = m.norm.beta_site
    if site is None:
        _append_affine(graph, m.norm.output, np.ones_like(beta), beta)
        return
    node, slot = site
    node.resize_inputs(slot + 1)
    node.replace_input_with(slot, add_constant(graph, f"{node.name}_beta", beta.astype(dtype)))


def _append_affine(graph: ir.Graph, value: ir.Value, scale: F64, shift: F64) -> ir.Value:
    """value * scale + shift behind `value`, for all its readers; returns the new value."""
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    out = value
    for op, vector, neutral in (("Mul", scale, 1.0), ("Add", shift, 0.0)):
        if np.all(vector == neutral):
            continue
        constant = add_constant(graph, f"{value.name}_{op.lower()}", vector.astype(dtype))
        node = new_node(graph, op, [out, constant], name=f"{value.name}_fold_{op.lower()}", like=value)
        splice_after(graph, out, node)
        out = node.outputs[0]
    return out


def _fold_value(m: VProjection, s: F64, changes: Changes) -> None:
    """Columns of the value projection (weight and bias) divided by s, which is indexed by its output channel."""
    divide_outputs(m.linear, s)
    made = {str(m.linear.node.outputs[0].name), str(m.linear.output.name)} if m.linear.channel_axis == -1 else set[str]()
    changes.map(made, AffineMap(s, np.zeros_like(s)))


def _absorber(m: Mlp) -> Linear | None:
    """The linear that can take 1 / s for free: a gate's partner, or fc1 in front of ReLU."""
    if m.gate is not None:
        return m.up if m.up is not None and m.up is not m.fc1 else None
    return m.fc1 if m.activation.kind == "relu" else None


def _fold_hidden(graph: ir.Graph, site: FoldSite, m: Mlp, r: F64, t: F64, changes: Changes) -> set[str]:
    absorber = _absorber(m)
    if absorber is not None:
        divide_outputs(absorber, r)
        return {str(absorber.output.name), str(absorber.node.outputs[0].name), str(m.hidden.name)}
    new = _append_affine(graph, site.tensor, 1 / r, -t / r)
    changes.derived[str(new.name)] = (str(site.tensor.name), AffineMap(r, t))
    return set()


def _fold_linear(graph: ir.Graph, linear: Linear, r: F64, t: F64) -> set[str]:
    moved = absorb_shift(graph, linear, t) if np.any(t) else set[str]()
    scale_inputs(linear, r)
    return moved


def _moved(site: FoldSite) -> Iterator[str]:
    yield from site.readers if site.kind != "hidden" or site.free else ()
    match site.match:
        case NormToLinears(norm=norm, path=path):
            yield str(norm.output.name)
            yield from (str(v.name) for node in path for v in node.outputs)
        case VProjection():
            yield from names_between([site.match.linear.node], site.match.out.node)
        case Mlp(hidden=hidden, path=path) if site.free:
            yield str(hidden.name)
            yield from (str(v.name) for node in path for v in node.outputs)
            yield from names_between([site.match.fc1.node], site.match.fc2.node)
        case _:
            return
