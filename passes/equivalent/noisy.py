"""noisy: NoisyQuant's additive offset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np

from qcompile.calib.observe.change import Foldable
from qcompile.decide.ranges import Seen, automatic, choose
from qcompile.pipeline.base import PassContext
from qcompile.pipeline.fold import Fold, FoldPass
from qcompile.pipeline.site import Missed
from qcompile.quant.affine import fake_quant, qparams_from_range
from qcompile.rewrite.fold import FoldSite
from qcompile.target.specs import activation_spec


@dataclass(frozen=True)
class NoisyQuant(FoldPass):
    """Move each channel by a fraction of a quantization step, so that fewer values lie between two codes.

    before: LayerNorm(gamma, beta) -> MatMul(W), c
    after:  LayerNorm(gamma, beta + N) -> MatMul(W), c - N W
    Q(x + N) W + (c - N W) (Liu et al. 2023, arXiv:2211.16056, eq. 5).  Only N modulo the step matters: it is searched, where the
    paper draws it at random, for each channel on half of the rows, and kept where the error falls on the other half too.
    Exact in float on every target, without a new node.  Put it behind repq or smooth: on outliers alone it hurts.
    Refused where a shift is: behind an RMSNorm, and in front of padding that is not zero.
    """

    name = "noisy"
    claims = False  # an offset undoes no other fold
    grid: Annotated[int, "offsets in a step that are tried"] = 16

    def __post_init__(self) -> None:
        self.check_range("grid", 2, 256)

    def choose(self, site: FoldSite, ctx: PassContext) -> Fold | Missed:
        """The offset of each channel that pays."""
        seen = Foldable.of(site.tensor).told(ctx.told)
        rows = seen.rows.rows
        if site.shift_refusal or len(rows) < 2:
            return Missed(site.shift_refusal or "there are no rows to judge by")
        spec = activation_spec(ctx.request())
        found = choose(automatic(spec), spec, Seen(seen.extremes, seen.rows), ())
        params = qparams_from_range(found.lo, found.hi, spec.qtype, spec.symmetric)

        def errors(x: np.ndarray, n: np.ndarray) -> np.ndarray:
            moved = (x + n).astype(np.float32)
            return np.square(fake_quant(moved, params, spec.qtype) - moved, dtype=np.float64).sum(0)

        fitted, judged, grid = rows[::2], rows[1::2], np.arange(self.grid) / self.grid * float(params.scale)
        best = grid[np.argmin([errors(fitted, n) for n in grid], axis=0)]
        before, after = errors(judged, np.zeros(1)), errors(judged, best)
        n = np.where(after < before, best, 0.0)
        gain = round(float(10 * np.log10(before.sum() / np.minimum(before, after).sum())), 2)
        if not n.any():
            return Missed("no offset lowers the error on held-out rows", {"gain_db": gain})
        return Fold(np.ones_like(n), -n, "channels moved by a fraction of a step", {"gain_db": gain})
