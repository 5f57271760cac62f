"""smooth: SmoothQuant and its shifted form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.observe import MinMaxStat
from qcompile.calib.observe.change import Foldable
from qcompile.ir.model import Model
from qcompile.pipeline.base import Kind, PassContext
from qcompile.pipeline.fold import Fold, FoldPass
from qcompile.pipeline.site import Missed
from qcompile.rewrite.fold import FoldSite, hidden_sites, norm_sites, value_sites
from qcompile.rewrite.held_out import TOO_FEW, Fit, Half, Judge, decibels
from qcompile.structure import Matches, VProjection
from qcompile.structure.core import joined
from qcompile.target.target import Target

F64 = NDArray[np.float64]
_COARSE, _STEP = (0.0, 0.3, 0.5, 0.7, 0.9), 0.1
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
    gains less than 0.2 dB is left alone.  A given alpha is judged so too, and left out where it costs.
    Refuses a norm that also feeds the residual stream (post-norm), a graph output, or anything that is no linear layer.
    """

    name = "smooth"
    kind = Kind.EQUIVALENT
    alpha: Annotated[float, "migration strength in [0, 1]: 0 leaves activations, 1 equalizes them"] = 0.5
    shift: Annotated[bool, "centre each channel first (SQ-b)"] = False
    search: Annotated[bool, "choose alpha for each site by the layer's output error on held-out calibration rows"] = False
    sites_: Annotated[Literal["all", "norm"], "fold all sites, or only norm -> linear"] = "all"
    always: Annotated[bool, "fold with `alpha` as published, whatever held-out rows say"] = False
    override: Annotated[bool, "fold sites again that another pass has folded"] = False

    def __post_init__(self) -> None:
        self.check_range("alpha", 0.0, 1.0)

    def sites(self, model: Model, ctx: PassContext) -> Matches[FoldSite]:
        """Norm -> linears; value -> output projection; hidden layers."""
        finders = (norm_sites, value_sites, hidden_sites) if self.sites_ == "all" else (norm_sites,)
        return joined(find(model.graph) for find in finders)

    def choose(self, site: FoldSite, ctx: PassContext) -> Fold | Missed:
        """The ratios, if they pay."""
        stat, weight = ctx.told[Foldable.of(site.tensor).extremes], site.weight_rows()
        if stat.lo.shape != (weight.shape[0],):
            return Missed("the measured channels do not match the weight's rows")
        judged = self._judged(site, self.judge(site, ctx), ctx.target)
        if isinstance(judged, Missed):
            return judged
        alpha, gain = judged
        shift = self._shift(site, stat)
        r = ratios(stat, shift, largest_of_rows(weight), alpha)
        if site.channels is not None:
            r = _by_channel(r, site)
        layers = ", ".join(str(x.node.name) for x in site.linears)
        numbers = {"alpha": alpha, "r_min": float(r.min()), "r_max": float(r.max()), "gain_db": round(gain, 2)}
        return Fold(r, shift, f"{site.kind} site smoothed into {layers}", numbers)

    def _judged(self, site: FoldSite, judge: Judge, target: Target) -> tuple[float, float] | Missed:
        """The alpha of a site and its gain in dB, if it pays."""
        forced = self.always and site.free and not self.search
        if not judge.parts and not forced:
            return Missed(TOO_FEW)
        alpha, gain = self._best(site, judge)
        if forced:
            return self.alpha, gain
        if alpha == 0.0 or gain < max(judge.noise_db, self._needed_db(site, target)):
            reason = "does not pay: the layer's output error on held-out rows would hardly fall"
            return Missed(reason, {"gain_db": round(gain, 2)})
        return alpha, gain

    def _shift(self, site: FoldSite, stat: MinMaxStat) -> F64:
        if not self.shift or site.shift_refusal is not None or site.kind == "value" or (site.kind == "hidden" and site.free):
            return np.zeros_like(stat.lo)
        return (stat.lo + stat.hi) / 2

    def _best(self, site: FoldSite, judge: Judge) -> tuple[float, float]:
        """The alpha that pays most on rows that it was not fitted to, and its gain over no smoothing in dB."""
        largest = largest_of_rows(judge.weight)

        def fit(half: Half, alpha: float) -> tuple[F64, F64]:
            shift = self._shift(site, half.extremes) * (alpha > 0)
            return shift, _row_ratios(half.extremes, shift, largest, alpha, site)

        return best_alpha(judge, lambda alpha: lambda half: fit(half, alpha), None if self.search else self.alpha)

    def _needed_db(self, site: FoldSite, target: Target) -> float:
        if site.free:
            return _MARGIN_DB if self.search else 0.0
        return _PAYS_DB if target.fuses_elementwise else _PAYS_DB_CPU


def best_alpha(judge: Judge, fit: Callable[[float], Fit], fixed: float | None) -> tuple[float, float]:
    """The alpha with the least error on judged rows, and its gain over alpha 0 in dB; `fixed` is the only other candidate.

    `fit(alpha)` gives a fold.
    """
    errors = {a: judge.error(fit(a)) for a in (_COARSE if fixed is None else (0.0, fixed))}
    best = min(errors, key=lambda a: (errors[a], a))
    if fixed is None and best > 0:
        errors |= {a: judge.error(fit(a)) for a in (round(best - _STEP, 1), round(best + _STEP, 1))}
        best = min(errors, key=lambda a: (errors[a], a))
    return best, decibels(errors[0.0], errors[best])


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
