"""Run a plan as a stream of events: what has to be known, what is done; verified by kind, measured, reproducible on failure."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import psutil

from qcompile.calib.observe import NotCarried, Probe, Stat, Told
from qcompile.calib.observe.change import AffineMap, Changes
from qcompile.errors import GateError, QcompileError, VerifyError
from qcompile.ir.model import Model
from qcompile.ir.spill import is_large
from qcompile.ir.verify import verify_interface, verify_structure
from qcompile.pipeline.base import Comparator, Kind, Needs, Pass, PassContext, PassResult
from qcompile.pipeline.spec import format_pass
from qcompile.pipeline.verify import Verifier
from qcompile.report import PassReport, Remarks
from qcompile.structure.core import forget_found, keep_found

_NEVER = 2**31 - 1
_MANY = 2048  # nodes

VerifyMode = Literal["each", "end", "off"]
Stats = Mapping[Probe[Any], Stat]


@dataclass(frozen=True)
class Failure:
    """A pass that failed: the model just before it and the pass's spec, enough to run it again."""

    spec: str
    model: Model
    error: Exception


@dataclass(frozen=True)
class Starts:
    """The pass `spec` is about to run, as number `index` of `total`."""

    spec: str
    index: int
    total: int


@dataclass(frozen=True)
class Ran:
    """A pass has run; `model` is what it left.  Whether it kept the function may be known only behind later forms."""

    report: PassReport
    model: Model


Steps = Generator[Starts | Needs | Ran, Stats | None, tuple[Model, list[PassReport]]]


@dataclass
class Runner:
    """Runs passes one after the other on one model.

    Without a comparator nothing is compared.  `known` are statistics of the model that is run; passes carry them on or drop
    them.  `on_failure` may keep what is needed to run a failed pass again, and answers with words for the message.
    `reference`: afterwards, the float model's outputs if anything was compared with them.
    """

    comparator: Comparator | None = None
    verify: VerifyMode = "each"
    strict: bool = False
    on_failure: Callable[[Failure], str] = lambda failure: ""
    known: dict[Probe[Any], Stat] = field(default_factory=dict[Probe[Any], Stat])
    reference: Any = field(default=None, init=False)

    def steps(self, model: Model, passes: Sequence[Pass], ctx: PassContext, *, user: Sequence[bool] | None = None) -> Steps:
        """Apply `passes` in order to a copy of `model`; returns the result and one report a pass.

        Each `Needs` is to be sent its statistics, one sweep's; the other events are news.

        Args:
            user: which passes the user wrote (all of them by default): `strict` holds those to have changed something.

        Raises:
            VerifyError: a pass broke its contract.
            GateError: under `strict`, a pass that the user wrote changed nothing.
        """
        current, reports = model.clone(), list[PassReport]()
        verifier = Verifier(self.comparator if self.verify != "off" else None, self.verify, model, self._failed)
        keep_found(current.graph)
        before, moved = model, False
        with _collected(model) as collect:
            for i, p in enumerate(passes):
                before = current.clone() if moved else before
                yield Starts(format_pass(p), i, len(passes))
                verifier.meets(p, current, reports)
                seen = replace(ctx, remarks=Remarks(p.name))
                report, result = yield from self._one(p, current, passes[i + 1 :], seen, before)
                self._gate(report, user[i] if user else True)
                reports.append(report)
                verifier.saw(p, result, before, current, reports, _again(p, before, seen))
                moved = result.modified
                if moved:
                    collect()
                yield Ran(reports[-1], current)
        verifier.finish(passes, current, reports)
        self.reference = verifier.reference
        forget_found(current.graph)
        return current, reports

    def _one(
        self, p: Pass, model: Model, later: Sequence[Pass], ctx: PassContext, before: Model
    ) -> Generator[Needs, Any, tuple[PassReport, PassResult]]:
        start = time.perf_counter()
        try:
            ctx.told = yield from self._told(p, model, later, ctx)
            result = yield from _working(p, model, ctx)
            if not result.modified and not ctx.remarks.all:
                ctx.remarks.note("", "no site matched")
            verify_structure(model, p.name)
            if not p.changes_function:
                verify_interface(before, model, p.name)
        except Exception as e:
            hint = self._failed(p, before, e)
            if isinstance(e, QcompileError):
                e.args = (f"{e}{hint}",)
                raise
            raise VerifyError(f"pass {p.name!r} failed: {type(e).__name__}: {e}{hint or '; please report it'}") from e
        self._carry(result.changes)
        seconds, rss = time.perf_counter() - start, psutil.Process().memory_info().rss / 1e6
        return PassReport(format_pass(p), p.kind.value, result.modified, tuple(ctx.remarks.all), seconds, rss), result

    def _failed(self, p: Pass, before: Model, error: Exception) -> str:
        return self.on_failure(Failure(format_pass(p), before, error))

    # statistics -----------------------------------------------------------------------------

    def _told(self, p: Pass, model: Model, later: Sequence[Pass], ctx: PassContext) -> Generator[Needs, Any, Told]:
        """The answers to the probes of `p`; one sweep for them and for what later passes would ask of this model."""
        wanted = list(dict.fromkeys(p.probes(model, ctx)))
        missing = [probe for probe in wanted if probe not in self.known]
        if missing:
            early = (probe for probe in self._early(p, later, model, ctx) if probe not in self.known)
            self.known |= (yield Needs(model, tuple(dict.fromkeys([*missing, *early])), p.name)) or {}
        return Told({probe: self.known[probe] for probe in wanted})

    def _early(self, p: Pass, later: Sequence[Pass], model: Model, ctx: PassContext) -> Iterable[Probe[Any]]:
        """Probes of later passes that may still hold when they run."""
        scratch = replace(ctx, remarks=Remarks())
        moved = set(p.moves(model, scratch))
        for q in later:
            told = replace(scratch, remarks=Remarks(q.name))
            yield from (x for x in q.probes(model, told) if x.tensor not in moved or x.observer.follows)
            moved |= set(q.moves(model, told))

    def _carry(self, changes: Changes) -> None:
        """Keep statistics that the pass's changes of variable carry over exactly; drop the others."""
        for tensor, (source, change) in changes.derived.items():
            for probe in [k for k in self.known if k.tensor == source]:
                self._keep(replace(probe, tensor=tensor), self.known[probe], change)
        for probe in [k for k in self.known if k.tensor in changes.maps or k.tensor in changes.moved]:
            stat = self.known.pop(probe)
            if probe.tensor in changes.maps:
                self._keep(probe, stat, changes.maps[probe.tensor])

    def _keep(self, probe: Probe[Any], stat: Stat, change: AffineMap) -> None:
        with contextlib.suppress(NotCarried):
            self.known[probe] = stat.mapped(change.t, change.r)

    def _gate(self, report: PassReport, by_user: bool) -> None:
        if self.strict and by_user and not report.modified:
            reasons = "; ".join(dict.fromkeys(r.reason for r in report.remarks)) or "no site matched"
            raise GateError(f"--strict: pass {report.spec!r} changed nothing ({reasons}); remove it, or drop --strict")


def _again(p: Pass, before: Model, ctx: PassContext) -> Callable[[Sequence[str]], Model | None]:
    """The pass run once more from the same statistics, with the nodes of some names left alone; None if it asks for others."""

    def run(names: Sequence[str]) -> Model | None:
        model = before.clone()
        told = replace(ctx, remarks=Remarks(p.name), selection=ctx.selection.without(names))
        told.told = ctx.told
        try:
            next(p.rounds(model, told))
        except StopIteration:
            return model
        return None

    return run


def _working(p: Pass, model: Model, ctx: PassContext) -> Generator[Needs, Any, PassResult]:
    """The pass at work; what finders know of the graph is forgotten once it may change."""
    if (p.kind is Kind.ANNOTATE and not p.imports) or p.looks_first:
        result = yield from p.rounds(model, ctx)
        keep_found(model.graph)
        return result
    found = forget_found(model.graph)
    result = yield from p.rounds(model, ctx)
    keep_found(model.graph, None if result.modified else found)
    return result


def without_data(needs: Needs) -> Stats:
    """Raises GateError: nothing can be measured."""
    raise GateError(f"pass {needs.by!r} needs calibration data; give some with --calib")


def drive(
    steps: Steps, answer: Callable[[Needs], Stats] = without_data, news: Callable[[Starts | Ran], None] = lambda event: None
) -> tuple[Model, list[PassReport]]:
    """Take `steps` to their end: `answer` makes a sweep each, `news` hears of everything else."""
    sent: Stats | None = None
    while True:
        try:
            event = steps.send(sent)
        except StopIteration as end:
            return end.value
        sent = answer(event) if isinstance(event, Needs) else news(event)


@contextlib.contextmanager
def _collected(model: Model) -> Generator[Callable[[], object]]:
    """Graphs are circles of small objects, and each pass drops some copies of them: of many nodes, Python would look through all
    that live many times a pass.  Meanwhile it looks through the young ones only; through all where it is told to.

    Few nodes are left to Python, since a process of its own has more objects than they.  So is a model of large weights,
    whatever that takes: files and mapped weights go with its copies.
    """
    if len(model.graph) < _MANY or is_large(model.graph):
        yield lambda: None
        return
    thresholds = gc.get_threshold()
    gc.set_threshold(*thresholds[:2], _NEVER)
    try:
        yield gc.collect
    finally:
        gc.set_threshold(*thresholds)
