"""SitePass: a pass that looks at one kind of site, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import onnx_ir as ir

from qcompile.calib.observe import Probe
from qcompile.calib.observe.change import Changes
from qcompile.ir.model import Model
from qcompile.ir.notes import claim, claimed_by
from qcompile.pipeline.base import Pass, PassContext, PassResult
from qcompile.structure.core import Matches, forget_found, found_once, keep_found

S = TypeVar("S")
Numbers = Mapping[str, float | int | str]


@dataclass(frozen=True)
class Applied:
    """A site was rewritten: how, and measured values."""

    reason: str
    numbers: Numbers = field(default_factory=dict[str, float | int | str])


@dataclass(frozen=True)
class Missed:
    """A site was left alone: why, and measured values."""

    reason: str
    numbers: Numbers = field(default_factory=dict[str, float | int | str])


@dataclass(frozen=True)
class SitePass(Pass, Generic[S]):
    """One walk for probes and rewrite: `sites` finds, `asks` names the statistics of a site, `rewrite` changes it.

    The base leaves alone, with a remark each: near misses of `sites`, what the user's selectors exclude, sites that another
    pass has `claims` on, and everything where the pass is `unfit`.  An `override` field takes claimed sites all the same.
    `nothing` is what it says of a model without sites.
    """

    claims: ClassVar[bool] = False
    nothing: ClassVar[str] = "no site matched"
    looks_first: ClassVar[bool] = True

    def sites(self, model: Model, ctx: PassContext) -> Matches[S]:
        """The sites in order, and the near misses with their reasons; called once a version of the graph."""
        raise NotImplementedError

    def node(self, site: S) -> ir.Node:
        """The node that remarks name and that carries the claim: the site itself where it is a node."""
        assert isinstance(site, ir.Node), f"{type(self).__name__} does not say which node stands for its sites"
        return site

    def nodes(self, site: S) -> Iterable[ir.Node]:
        """The nodes that the user's selectors are held against."""
        return (self.node(site),)

    def asks(self, site: S, ctx: PassContext) -> Iterable[Probe[Any]]:
        """The statistics that `rewrite` reads."""
        return ()

    def sure(self, site: S, ctx: PassContext) -> Iterable[str]:
        """Tensors that `rewrite` will move whatever the statistics say."""
        return ()

    def unfit(self, ctx: PassContext) -> str | None:
        """Why the pass has nothing to do for this scheme and target, or None."""
        return None

    def rewrite(self, model: Model, site: S, ctx: PassContext, changes: Changes) -> Applied | Missed:
        """Rewrite one site in place and note the tensors that moved in `changes`, or say why not."""
        raise NotImplementedError

    def rewrites(self, model: Model, sites: Sequence[S], ctx: PassContext, changes: Changes) -> Iterator[Applied | Missed]:
        """An answer for each of `sites`, for passes that weigh them together."""
        return (self.rewrite(model, site, ctx, changes) for site in sites)

    def finish(self, model: Model) -> None:
        """Tidy up behind the last rewritten site."""

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe[Any]]:
        """What all sites ask for."""
        if self.unfit(ctx) is None:
            yield from dict.fromkeys(p for site in self._found(model, ctx) for p in self.asks(site, ctx))

    def moves(self, model: Model, ctx: PassContext) -> Iterable[str]:
        """What surely moves at the sites that may be rewritten."""
        if self.unfit(ctx) is None:
            yield from (name for s in self._found(model, ctx) if self._left_alone(s, ctx) is None for name in self.sure(s, ctx))

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Rewrite every site that may be; a remark on each of them."""
        if (reason := self.unfit(ctx)) is not None:
            ctx.remarks.missed("", reason)
            return PassResult(False)
        changes, done = Changes(), False
        free = self._free(self._found(model, ctx), ctx)
        found = forget_found(model.graph)
        for site, answer in zip(free, self.rewrites(model, free, ctx, changes), strict=True):
            self._remark(site, answer, ctx)
            done = done or isinstance(answer, Applied)
        if done:
            self.finish(model)
        else:
            keep_found(model.graph, found)
        return PassResult(done, changes)

    def _found(self, model: Model, ctx: PassContext) -> Matches[S]:
        return found_once(model.graph, (type(self), self), lambda: self.sites(model, ctx))

    def _free(self, matches: Matches[S], ctx: PassContext) -> list[S]:
        if not (matches.found or matches.refused):
            ctx.remarks.note("", self.nothing)
        for refusal in matches.refused:
            ctx.remarks.missed(str(refusal.node.name), refusal.reason)
        free: list[S] = []
        for site in matches:
            reason = self._left_alone(site, ctx)
            if reason is None:
                free.append(site)
            else:
                ctx.remarks.missed(str(self.node(site).name), reason)
        return free

    def _left_alone(self, site: S, ctx: PassContext) -> str | None:
        owner = claimed_by(self.node(site)) if self.claims else None
        if owner and owner != self.name and not getattr(self, "override", False):
            return f"claimed by {owner}"
        return ctx.selection.any_excluded(self.nodes(site))

    def _remark(self, site: S, answer: Applied | Missed, ctx: PassContext) -> None:
        if isinstance(answer, Missed):
            ctx.remarks.missed(str(self.node(site).name), answer.reason, **answer.numbers)
            return
        if self.claims:
            claim(self.node(site), self.name)
        ctx.remarks.applied(str(self.node(site).name), answer.reason, **answer.numbers)
