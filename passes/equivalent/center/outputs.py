"""Outputs of norms, and of GELU behind a Sub: LayerNorm(g, b) -> W, c = LayerNorm(g, b - t) -> W, c + t W."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.calib.observe import MinMax, Probe
from qcompile.calib.observe.change import Changes
from qcompile.ir.model import Model
from qcompile.passes.equivalent.center.shift import PAYS, centre
from qcompile.pipeline.base import PassContext
from qcompile.rewrite.fold import FoldSite, fold, hidden_sites, norm_sites
from qcompile.structure import Matches
from qcompile.structure.core import joined


@dataclass(frozen=True)
class Outputs:
    """Centre the outputs of norms (`norm`) and hidden layers (`gelu`)."""

    norm: bool
    gelu: bool

    def probes(self, model: Model) -> Iterator[Probe]:
        """Per-channel extremes of what the linears read."""
        yield from (MinMax(-1).of(site.tensor) for site in self._sites(model))

    def apply(self, model: Model, ctx: PassContext, changes: Changes) -> bool:
        """Every site that allows a shift."""
        sites = self._sites(model)
        for refusal in sites.refused:
            ctx.remarks.missed(str(refusal.node.name), refusal.reason)
        done = [self._shift_site(model.graph, site, ctx, changes) for site in sites]
        return any(done)

    def _sites(self, model: Model) -> Matches[FoldSite]:
        norms = norm_sites(model.graph) if self.norm else Matches[FoldSite](())
        hidden = hidden_sites(model.graph) if self.gelu else Matches[FoldSite](())
        return joined((norms, Matches(tuple(s for s in hidden if not s.free), hidden.refused)))

    def _shift_site(self, graph: ir.Graph, site: FoldSite, ctx: PassContext, changes: Changes) -> bool:
        reason = site.shift_refusal or ctx.selection.any_excluded(x.node for x in site.linears)
        stat = ctx.told[MinMax(-1).of(site.tensor)]
        if reason or stat.lo.shape != (site.linears[0].in_channels,):
            ctx.remarks.missed(str(site.anchor.name), reason or "the measured channels do not match the weight's rows")
            return False
        t, before, after = centre(stat.lo, stat.hi)
        if after > PAYS * before:
            ctx.remarks.missed(
                str(site.anchor.name), "already centred: the range would hardly shrink", largest=before, centred=after
            )
            return False
        fold(graph, site, np.ones_like(t), t, changes)
        ctx.remarks.applied(str(site.anchor.name), f"{site.kind} output centred", largest=before, centred=after)
        return True
