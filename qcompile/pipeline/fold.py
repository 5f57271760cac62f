"""FoldPass: a pass that shifts and scales channels in front of linear layers, and undoes it in their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe import Probe
from qcompile.calib.observe.change import Changes, Foldable
from qcompile.ir.model import Model
from qcompile.pipeline.base import Kind, PassContext
from qcompile.pipeline.site import Applied, Missed, SitePass
from qcompile.quant.qtype import INT8
from qcompile.quant.spec import PerTensor, QuantSpec
from qcompile.rewrite.fold import FoldSite, fold, norm_sites
from qcompile.rewrite.held_out import Judge, Types, halves
from qcompile.structure.core import Matches

F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Fold:
    """x' = (x - t) / r for each channel of a site: r nonzero and t, both [C]; what the remark says."""

    r: F64
    t: F64
    reason: str
    numbers: Mapping[str, float | int | str] = field(default_factory=dict[str, float | int | str])


@dataclass(frozen=True)
class FoldPass(SitePass[FoldSite]):
    """Norm -> linears (or other `sites`), each folded by what `choose` says; later folds leave a folded site alone.

    A site's statistics are those of `Foldable`, which follow the fold: `annotate` needs no other sweep behind it.
    """

    kind = Kind.EQUIVALENT
    claims = True

    def choose(self, site: FoldSite, ctx: PassContext) -> Fold | Missed:
        """The fold of one site, or why it is left alone."""
        raise NotImplementedError

    def judge(self, site: FoldSite, ctx: PassContext) -> Judge:
        """What folds of a site are worth on rows that they were not fitted to."""
        seen = Foldable.of(site.tensor).told(ctx.told)
        activation = QuantSpec(ctx.scheme.activation or INT8, PerTensor(), ctx.target.symmetric)
        return Judge(halves(seen.extremes, seen.rows), site.weight_rows(), Types(activation, ctx.scheme.weight or INT8))

    def unfit(self, ctx: PassContext) -> str | None:
        """Without activation codes no range matters."""
        return "the scheme leaves activations in float" if ctx.scheme.activation is None else None

    def sites(self, model: Model, ctx: PassContext) -> Matches[FoldSite]:
        """Norm -> linears."""
        return norm_sites(model.graph)

    def node(self, site: FoldSite) -> ir.Node:
        """The norm, the product with V, or fc2."""
        return site.anchor

    def nodes(self, site: FoldSite) -> Iterable[ir.Node]:
        """The linear layers."""
        return (x.node for x in site.linears)

    def asks(self, site: FoldSite, ctx: PassContext) -> Iterable[Probe[Any]]:
        """Per-channel extremes and a sample of rows."""
        return Foldable.of(site.tensor).probes

    def rewrite(self, model: Model, site: FoldSite, ctx: PassContext, changes: Changes) -> Applied | Missed:
        """Fold as chosen."""
        chosen = self.choose(site, ctx)
        if isinstance(chosen, Missed):
            return chosen
        fold(model.graph, site, chosen.r, chosen.t, changes)
        return Applied(chosen.reason, chosen.numbers)
