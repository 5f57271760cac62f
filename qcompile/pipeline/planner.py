"""Completion: put in front of each pass what it needs and nobody has done, and behind the last one what the target wants."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from qcompile.errors import UsageError
from qcompile.pipeline import registry
from qcompile.pipeline.base import Kind, Pass, Stage
from qcompile.quant.spec import Scheme
from qcompile.target.target import Target


@dataclass(frozen=True)
class Plan:
    """The completed pipeline; `inserted[i]` tells whether the planner put pass i in."""

    passes: tuple[Pass, ...]
    inserted: tuple[bool, ...]


def complete(
    user: Sequence[Pass],
    target: Target,
    scheme: Scheme,
    *,
    exact: bool = False,
    done: Collection[str] = (),
    quantized: bool = False,
) -> Plan:
    """Walk the user's passes and add what is missing; the user's passes never move.

    `done` names passes that the input model went through already (a half-run pipeline continues); `quantized`: it holds Q/DQ.

    Raises:
        UsageError: a pass stands where its work would be undone or too late.
    """
    plan = _Planner(target, scheme, quantized)
    for p in registry.known(done):
        plan.note(p)
    for p in user:
        if not exact:
            plan.prepare(p)
        plan.append(p, inserted=False)
    if not exact and not (user and user[-1].ends):
        plan.insert(target.lowering(scheme))
    return Plan(tuple(p for p, _ in plan.made), tuple(i for _, i in plan.made))


@dataclass
class _Planner:
    """A plan in the making: which passes have run at its end, and how far the model is then."""

    target: Target
    scheme: Scheme
    quantized: bool = False
    made: list[tuple[Pass, bool]] = field(default_factory=list[tuple[Pass, bool]])
    ran: set[str] = field(default_factory=set[str])
    stage: Stage = Stage.SOURCE

    def prepare(self, p: Pass) -> None:
        """Bring the model to where `p` can start: its stage, the passes it comes behind, the lowering in front of it."""
        self._reach(p.needs)
        if self.quantized and p.kind is not Kind.EQUIVALENT and not p.imports:
            self.insert((registry.IMPORT,))
        self.insert(p.after)
        lowering = self.target.lowering(self.scheme)
        if p.name in lowering:
            self.insert(lowering[: lowering.index(p.name)])

    def insert(self, names: Iterable[str]) -> None:
        """Those of the passes `names` that have not run."""
        for name in names:
            if name not in self.ran:
                p = registry.pass_named(name)
                self.prepare(p)
                self.append(p, inserted=True)

    def append(self, p: Pass, *, inserted: bool) -> None:
        """`p` at the end of the plan."""
        if self.stage >= Stage.LOWERED and p.kind is not Kind.LOWER:
            raise UsageError(f"pass {p.name!r} stands behind the insertion of Q/DQ nodes, too late to work; move it to the front")
        if self.stage >= Stage.DECIDED and p.kind is Kind.EQUIVALENT:
            raise UsageError(f"pass {p.name!r} rewrites the float graph and must stand before 'annotate'; move it to the front")
        if registry.IMPORT in self.ran and p.kind is Kind.EQUIVALENT:
            raise UsageError(f"pass {p.name!r} rewrites the float graph and must stand before 'import-qdq'; move it to the front")
        self.made.append((p, inserted))
        self.note(p)

    def note(self, p: Pass) -> None:
        """`p` has run."""
        self.ran.add(p.name)
        self.quantized = self.quantized and not p.imports
        self.stage = max(self.stage, p.reaches)

    def _reach(self, stage: Stage) -> None:
        for step in range(Stage.CANONICAL, stage + 1):
            if step == Stage.FORMED:
                unify = (registry.UNIFY,) if self.quantized else ()
                self.insert((*unify, *registry.wanted_forms(self.target, self.scheme)))
            elif self.stage < step:
                self.insert((registry.PROVIDERS[Stage(step)],))
