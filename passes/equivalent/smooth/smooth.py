"""smooth: SmoothQuant and its shifted form."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.observe import MinMaxStat
from qcompile.calib.observe.change import Foldable
from qcompile.ir.model import Model
from qcompile.passes.equivalent.smooth.search import Types, best_alpha, halves
from qcompile.pipeline.base import Kind, PassContext
from qcompile.pipeline.fold import Fold, FoldPass
from qcompile.pipeline.site import Missed
from qcompile.quant.qtype import INT8
from qcompile.quant.spec import PerTensor, QuantSpec
from qcompile.rewrite.fold import FoldSite, hidden_sites, norm_sites, value_sites
from qcompile.structure import Matches, VProjection
from qcompile.structure.core import joined
from qcompile.target.target import Target

F64 = NDArray[np.float64]
# Less is within the noise of a sample of rows.
_MARGIN_DB = 0.2
# A Mul behind GELU is fused by TensorRT and costs time on the CPU provider.
_PAYS_DB = 1.0
_PAYS_DB_CPU = 6.0


@dataclass(frozen=True)
class SmoothQuant(FoldPass):
    """Move activation outliers into weights: Norm -> Linear becomes Norm / r -> Linear * r.

    before: LayerNorm(gamma, beta) -> MatMul(W) -> Add(c)
    after:  LayerNorm(gamma / r, (beta - t) / r) -> MatMul(diag(r) W) -> Add(c + t W)
    r_j = max|x_j - t_j|^alpha / max_o|W_jo|^(1 - alpha) (Xiao et al. 2022, arXiv:2211.10438, eq. 4); with `shift`
    t_j = (max x_j + min x_j) / 2 (SQ-b of MPTQ-ViT, arXiv:2401.14895), else 0.  Also V -> output projection, and where it
    gains at least 1 dB (6 dB on `ort`), GELU -> fc2 (one Mul is inserted).  `search` picks alpha a site by the layer's output
    error on held-out rows: each half of the samples is judged with the ratios and the range of the other, and a site that
    gains less than 0.2 dB is left alone.
    Refuses a norm that also feeds the residual stream (post-norm), a graph output, or anything that is no linear layer.
    """

    name = "smooth"
    kind = Kind.EQUIVALENT
    alpha: Annotated[float, "migration strength in [0, 1]: 0 leaves activations, 1 equalizes them"] = 0.5
    shift: Annotated[bool, "centre each channel first (SQ-b)"] = False
    search: Annotated[bool, "choose alpha for each site by the layer's output error on held-out calibration rows"] = False
    sites_: Annotated[Literal["all", "norm"], "fold all sites, or only norm -> linear"] = "all"
    override: Annotated[bool, "fold sites again that another pass has folded"] = False

    def __post_init__(self) -> None:
        self.check_range("alpha", 0.0, 1.0)

    def sites(self, model: Model, ctx: PassContext) -> Matches[FoldSite]:
        """Norm -> linears; value -> output projection; hidden layers."""
        finders = (norm_sites, value_sites, hidden_sites) if self.sites_ == "all" else (norm_sites,)
        return joined(find(model.graph) for find in finders)

    def sure(self, site: FoldSite, ctx: PassContext) -> Iterable[str]:
        """Every tensor of the site, where nothing is searched."""
        return site.moved if site.free and not self.search and self.alpha else ()

    def choose(self, site: FoldSite, ctx: PassContext) -> Fold | Missed:
        """The ratios, if they pay."""
        stat, weight = ctx.told[Foldable.of(site.tensor).extremes], site.weight_rows()
        if stat.lo.shape != (weight.shape[0],):
            return Missed("the measured channels do not match the weight's rows")
        shift = self._shift(site, stat)
        alpha, gain = self.alpha, None
        if self.search or not site.free:
            alpha, gain = self._best(site, stat, weight, ctx)
        if alpha == 0.0 or (gain is not None and gain < _needed_db(site, ctx.target)):
            reason = "does not pay: the layer's output error on held-out rows would hardly fall"
            return Missed(reason, {"gain_db": round(gain or 0.0, 2)})
        r = ratios(stat, shift, largest_of_rows(weight), alpha)
        if site.channels is not None:
            r = _by_channel(r, site)
        gained = {} if gain is None else {"gain_db": round(gain, 2)}
        layers = ", ".join(str(x.node.name) for x in site.linears)
        numbers = {"alpha": alpha, "r_min": float(r.min()), "r_max": float(r.max())}
        return Fold(r, shift, f"{site.kind} site smoothed into {layers}", numbers | gained)

    def _shift(self, site: FoldSite, stat: MinMaxStat) -> F64:
        if not self.shift or site.shift_refusal is not None or site.kind == "value" or (site.kind == "hidden" and site.free):
            return np.zeros_like(stat.lo)
        return (stat.lo + stat.hi) / 2

    def _best(self, site: FoldSite, stat: MinMaxStat, weight: F64, ctx: PassContext) -> tuple[float, float]:
        """The alpha that pays most on rows that it was not fitted to, and its gain over no smoothing in dB."""
        rows = ctx.told[Foldable.of(site.tensor).rows]

        largest = largest_of_rows(weight)

        def fitted(extremes: MinMaxStat, alpha: float) -> tuple[F64, F64]:
            shift = self._shift(site, extremes) * (alpha > 0)
            return shift, _row_ratios(extremes, shift, largest, alpha, site)

        activation = QuantSpec(ctx.scheme.activation or INT8, PerTensor(), ctx.target.symmetric)
        types = Types(activation, ctx.scheme.weight or INT8)
        return best_alpha(halves(stat, rows), weight, fitted, types, None if self.search else self.alpha)


def _needed_db(site: FoldSite, target: Target) -> float:
    if site.free:
        return _MARGIN_DB
    return _PAYS_DB if target.fuses_elementwise else _PAYS_DB_CPU


def largest_of_rows(weight: F64) -> F64:
    """max_n |W_cn| [C] of a weight [C, N]."""
    return np.abs(weight).max(1)


def ratios(stat: MinMaxStat, shift: F64, largest: F64, alpha: float) -> F64:
    """r [C] of SmoothQuant, from the largest weight of each row [C]; dead channels keep r = 1; clamped to [1e-5, 1e5]."""
    if alpha == 0.0:
        return np.ones_like(stat.lo)
    x = np.maximum(np.abs(stat.lo - shift), np.abs(stat.hi - shift))
    dead = (x <= 1e-8 * x.max(initial=0.0)) | (largest <= 1e-8 * largest.max(initial=0.0))
    r = np.maximum(x, 1e-30) ** alpha / np.maximum(largest, 1e-30) ** (1 - alpha)
    return np.where(dead, 1.0, np.clip(r, 1e-5, 1e5))


def _row_ratios(stat: MinMaxStat, shift: F64, largest: F64, alpha: float, site: FoldSite) -> F64:
    r = ratios(stat, shift, largest, alpha)
    return r if site.channels is None else _by_channel(r, site)[site.channels]


def _by_channel(r: F64, site: FoldSite) -> F64:
    """r by the value projection's output channel: the largest of the rows that read it, 1 for other channels."""
    assert site.channels is not None
    assert isinstance(site.match, VProjection)
    out = np.zeros(site.match.linear.out_channels)
    np.maximum.at(out, site.channels, r)
    return np.where(out > 0, out, 1.0)
