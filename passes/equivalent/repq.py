"""repq: RepQ-ViT's scale reparameterization."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.observe import MinMaxStat, Probe, Rows
from qcompile.calib.observe.change import FOLD_ROWS, Foldable
from qcompile.pipeline.base import Kind, Pass, PassContext
from qcompile.pipeline.fold import Fold, FoldPass
from qcompile.pipeline.site import Missed
from qcompile.rewrite.fold import FoldSite
from qcompile.rewrite.held_out import TOO_FEW

F64 = NDArray[np.float64]
# Other rows than those that set the range after the fold: a channel's own sampled extremes would hide its tails.
_SEEN = Rows(FOLD_ROWS, seed=1)
_NO_ROWS = np.empty((0, 0))
_PERCENTILES = (0.999, 0.9999, 0.99999)


@dataclass(frozen=True)
class RepQ(FoldPass):
    """Turn per-channel LayerNorm-output quantizers into one per-tensor quantizer, exactly (RepQ-ViT).

    before: LayerNorm(gamma, beta) -> MatMul(W) with scale s_j and zero point z_j a channel
    after:  LayerNorm(gamma / r, (beta - t) / r) -> MatMul(diag(r) W), c + t W with one scale s~ and zero point z~
    r_j = s_j / s~, t_j = s_j (z~ - z_j) (Li et al. 2023, arXiv:2212.08254, eq. 7-10).  z~ is an integer, so codes stay the same;
    where the target wants zero point 0, z~ = 2^(b-1).  s_j, z_j from the percentile with the least squared error.
    Exact in float on every target, without a new node.  A site is left alone unless its layers' output error falls on rows that
    the scales were not fitted to (each half of the samples judges the other): few rows hide most of a channel's range.
    Refuses the same sites as smooth; a shift that nonzero padding or an RMSNorm forbids leaves t = 0.
    """

    name = "repq"
    kind = Kind.EQUIVALENT
    percentile: Annotated[
        Literal["search", "minmax"], "clip each channel at the best of 99.9, 99.99, 99.999 %, or not at all"
    ] = "search"
    softmax: Annotated[Literal["uniform", "log-sqrt2"], "log-sqrt2 appends log2-softmax to the pipeline"] = "uniform"
    always: Annotated[bool, "fold as published, whatever held-out rows say"] = False
    override: Annotated[bool, "fold sites again that another pass has folded"] = False

    def sugar(self) -> tuple[Pass, str]:
        """`repq{softmax=log-sqrt2}` is `repq,...,log2-softmax{kind=log-sqrt2}`."""
        return replace(self, softmax="uniform"), "log2-softmax{kind=log-sqrt2}" if self.softmax == "log-sqrt2" else ""

    def asks(self, site: FoldSite, ctx: PassContext) -> Iterable[Probe[Any]]:
        """Per-channel ranges, and rows for the percentiles and the later ranges."""
        yield from super().asks(site, ctx)
        if self.percentile == "search":
            yield _SEEN.of(site.tensor)

    def choose(self, site: FoldSite, ctx: PassContext) -> Fold | Missed:
        """One scale for all channels, if it pays."""
        judge = self.judge(site, ctx)
        if not judge.parts and not self.always:
            return Missed(TOO_FEW)
        gain = judge.gain_db(lambda half: self._fit(site, ctx, half.fitted.rows, half.extremes))
        if gain < judge.noise_db and not self.always:
            return Missed(
                "does not pay: the layers' output error on held-out rows would hardly fall", {"gain_db": round(gain, 2)}
            )
        rows = ctx.told[_SEEN.of(site.tensor)].rows if self.percentile == "search" else _NO_ROWS
        t, r = self._fit(site, ctx, rows, ctx.told[Foldable.of(site.tensor).extremes])
        only = "" if site.shift_refusal is None else f", scale only: {site.shift_refusal}"
        numbers = {"r_min": float(r.min()), "r_max": float(r.max()), "gain_db": round(gain, 2)}
        return Fold(r, t, f"norm site reparameterized{only}", numbers)

    def _fit(self, site: FoldSite, ctx: PassContext, rows: NDArray[Any], extremes: MinMaxStat) -> tuple[F64, F64]:
        """(t, r) of what was seen of a site."""
        assert ctx.scheme.activation is not None
        bits, found = ctx.scheme.activation.bits, (extremes.lo, extremes.hi)
        lo, hi = best_percentile(rows.astype(np.float64), bits) if self.percentile == "search" else found
        r, t = reparameterize(lo, hi, bits, ctx.target.symmetric, shift=site.shift_refusal is None)
        return t, r


def best_percentile(x: F64, bits: int) -> tuple[F64, F64]:
    """Per-channel range of rows x [N, C]: the percentile with the least mean squared error over all elements."""
    best: tuple[float, F64, F64] | None = None
    for p in _PERCENTILES:
        lo, hi = np.quantile(x, 1 - p, axis=0), np.quantile(x, p, axis=0)
        s, z = scales(lo, hi, bits)
        error = float(np.square((np.clip(np.rint(x / s) + z, 0, 2**bits - 1) - z) * s - x).mean())
        if best is None or error < best[0]:
            best = (error, lo, hi)
    assert best is not None
    return best[1], best[2]


def scales(lo: F64, hi: F64, bits: int) -> tuple[F64, F64]:
    """Asymmetric s = (hi - lo) / (2^b - 1) and integer z = round(-lo / s), not clamped; a dead channel takes the mean s."""
    width = hi - lo
    dead = width <= 1e-8 * width.max(initial=0.0)
    s = width / (2**bits - 1)
    typical = float(s[~dead].mean()) if np.any(~dead) else 1.0
    s = np.where(dead, typical, s)
    return s, np.where(dead, 2.0 ** (bits - 1), np.rint(-lo / s))


def reparameterize(lo: F64, hi: F64, bits: int, symmetric: bool, shift: bool) -> tuple[F64, F64]:
    """(r, t) [C] that give all channels the scale s~ = mean s_j and the integer zero point z~."""
    s, z = scales(lo, hi, bits)
    common = float(2 ** (bits - 1)) if symmetric else float(np.clip(np.rint(z.mean()), 0, 2**bits - 1))
    if not shift:
        top = np.maximum(np.abs(lo), np.abs(hi))
        s = np.where(top > 0, top, top.max(initial=0.0) or 1.0) / (2 ** (bits - 1) - 1)
        return s / s.mean(), np.zeros_like(s)
    return s / s.mean(), s * (common - z)
