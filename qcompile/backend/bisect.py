"""Which Q/DQ groups break a build: delta debugging over the groups of a refused model.

ddmin of Zeller & Hildebrandt, "Simplifying and Isolating Failure-Inducing Input" (2002), on the set of groups that
stay quantized.  Each round ends with a set that fails by itself and of which no group can be spared; it is put into
float, and the rest is searched again until it builds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import onnx

from qcompile.backend.groups import Group, qdq_groups, without
from qcompile.backend.naming import uniquely_named_file
from qcompile.backend.profile import Profile
from qcompile.backend.tensorrt import plan_profiles, run_worker
from qcompile.errors import BuildError
from qcompile.ir.model import EXTERNAL_BYTES
from qcompile.ir.select import exactly
from qcompile.report import Note, listed
from qcompile.target.check import check
from qcompile.target.findings import Finding
from qcompile.target.view import GraphView

MAX_BUILDS = 40
NAMED = 6
Fails = Callable[[Sequence[Group]], bool]


@dataclass(frozen=True)
class Culprit:
    """Groups that break the build together, the rule that they break, if known, and other groups that break the same."""

    groups: tuple[Group, ...]
    rule: Finding | None
    same_rule: tuple[Group, ...] = ()

    @property
    def nodes(self) -> tuple[str, ...]:
        """All compute nodes of the groups."""
        return tuple(n for g in (*self.groups, *self.same_rule) for n in g.nodes)


@dataclass(frozen=True)
class Bisection:
    """What was found in `builds` builds.

    `rest_builds`: the model builds once the culprits are in float (False: the search stopped at its limit).
    `float_error`: the builder's words on the model without any Q/DQ, when that fails as well.
    """

    culprits: tuple[Culprit, ...]
    groups: int
    builds: int
    rest_builds: bool
    float_error: str | None = None

    @property
    def nodes(self) -> tuple[str, ...]:
        """The compute nodes of all culprits."""
        return tuple(dict.fromkeys(n for c in self.culprits for n in c.nodes))

    def advice(self) -> str:
        """What broke the build and what to do, as one sentence after the builder's message."""
        if self.groups == 0:
            return "the model holds no Q/DQ, so quantization is not the cause; correct the node that the message names"
        if self.float_error is not None:
            return f"it is not the quantization: the model without any Q/DQ fails too ({self.float_error})"
        if not self.culprits:
            return f"no cause found in {self.builds} builds; look at `qcompile check`"
        found = "; ".join(_sentence(c) for c in self.culprits)
        fixes = dict.fromkeys(c.rule.fix for c in self.culprits if c.rule is not None)
        keep = " ".join(f"--keep-float '{exactly(n)}'" for n in self.nodes[:NAMED]) + (" ..." if len(self.nodes) > NAMED else "")
        proof = "with these in float the rest builds" if self.rest_builds else f"there may be more after {self.builds} builds"
        return f"broken by the Q/DQ of {found}; {', '.join((*fixes, f'or compile with {keep} ({proof})'))}"


def _sentence(culprit: Culprit) -> str:
    own = [n for g in culprit.groups for n in (g.nodes or sorted(g.pairs))]
    together = " (only together)" if len(culprit.groups) > 1 else ""
    rule = f": {culprit.rule.rule}, {culprit.rule.message}" if culprit.rule is not None else ""
    same = f" (and {len(culprit.same_rule)} more groups by the same rule)" if culprit.same_rule else ""
    return f"{listed(own, NAMED)}{together}{rule}{same}"


def bisect(
    onnx_path: Path,
    error: str,
    *,
    target: str,
    gpus: Sequence[str],
    profiles: Sequence[Profile] | None = None,
    limit: int = MAX_BUILDS,
    progress: Note | None = None,
) -> Bisection:
    """Find the Q/DQ groups that make `onnx_path` fail to build.

    `error` is the builder's message; the groups that it or the rule checker names are tried first.

    Raises:
        BackendError, UsageError: as `run_worker`, for anything but a refused model.
    """
    with uniquely_named_file(onnx_path) as path:
        view = GraphView.open(path)
        found = list(check(path, target, gpus))
        groups = qdq_groups(view)
        if not groups:
            return Bisection((), 0, 0, False)
        trial = _Trials(view, path.parent, target, gpus, plan_profiles(view.model, profiles), limit, groups, progress)
        return _search(trial, _suspects(groups, found, error), found)


class OutOfBuilds(Exception):
    """The limit is reached."""


class _Trials:
    """Builds of the model with some groups left quantized; each set is built once."""

    def __init__(
        self,
        view: GraphView,
        folder: Path,
        target: str,
        gpus: Sequence[str],
        profiles: Sequence[Profile],
        limit: int,
        groups: Sequence[Group],
        progress: Note | None,
    ) -> None:
        self.view, self.folder, self.target, self.gpus, self.profiles = view, folder, target, gpus, profiles
        self.limit, self.groups, self.progress = limit, groups, progress
        self.errors: dict[frozenset[Group], str | None] = {}

    def fails(self, quantized: Sequence[Group]) -> bool:
        """Whether the model with only these groups quantized is refused."""
        key = frozenset(quantized)
        if key not in self.errors:
            if len(self.errors) >= self.limit:
                raise OutOfBuilds
            self.errors[key] = self._build(key)
            self._say(len(key), self.errors[key] is not None)
        return self.errors[key] is not None

    def _say(self, quantized: int, failed: bool) -> None:
        if self.progress is not None:
            verdict = "refused" if failed else "builds"
            self.progress(
                f"looking for the cause, build {len(self.errors)}: {quantized} of {len(self.groups)} groups quantized: {verdict}"
            )

    def _build(self, quantized: frozenset[Group]) -> str | None:
        """The builder's message, None when it builds."""
        model = without(self.view, [g for g in self.groups if g not in quantized])
        with tempfile.TemporaryDirectory(prefix="qcompile-bisect-") as name:
            path = Path(name) / "trial.onnx"
            _link_external(model, self.folder, path.parent)
            onnx.save(model, str(path), save_as_external_data=model.ByteSize() > EXTERNAL_BYTES, location="trial.data")
            try:
                run_worker(path, None, target=self.target, gpus=self.gpus, profiles=self.profiles)
            except BuildError as error:
                return str(error)
        return None


def _link_external(model: onnx.ModelProto, source: Path, folder: Path) -> None:
    """Make the external data of `model` reachable from `folder` without copying it: by a second name, on another file system
    by a symbolic link (which TensorRT follows, and our own reader refuses)."""
    for location in {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}:
        link = folder / location
        link.parent.mkdir(parents=True, exist_ok=True)
        file = (source / location).resolve()
        try:
            link.hardlink_to(file)
        except OSError:
            link.symlink_to(file)


def _suspects(groups: Sequence[Group], found: Sequence[Finding], error: str) -> list[Group]:
    """The groups that the rule checker calls wrong, or whose nodes the builder's message names."""
    wrong = [f.node for f in found if f.severity == "error"]
    named = (g for g in groups if any(n in error for n in (*g.nodes, *g.pairs)))
    return list(dict.fromkeys([*(g for g in groups if any(n in g for n in wrong)), *named]))


def _search(trial: _Trials, suspects: Sequence[Group], found: Sequence[Finding]) -> Bisection:
    if trial.fails([]):
        return Bisection((), len(trial.groups), 1, False, trial.errors[frozenset()])
    culprits: list[Culprit] = []
    rest = list(trial.groups)
    builds_now = False
    try:
        while not builds_now:
            start = [g for g in suspects if g in rest]
            broken = ddmin(start if start and trial.fails(start) else rest, trial.fails)
            rest = [g for g in rest if g not in broken]
            culprits.append(_culprit(broken, rest, found))
            rest = [g for g in rest if g not in culprits[-1].same_rule]
            builds_now = not trial.fails(rest)
    except OutOfBuilds:
        pass
    return Bisection(tuple(culprits), len(trial.groups), len(trial.errors), builds_now)


def _culprit(broken: Sequence[Group], rest: Sequence[Group], found: Sequence[Finding]) -> Culprit:
    """With the first error, else the first warning, at one of the groups' nodes; errors are looked for elsewhere too."""
    rule = next((f for g in broken for f in found if f.node in g), None)
    if rule is None or rule.severity != "error":
        return Culprit(tuple(broken), rule)
    wrong = [f.node for f in found if f.rule == rule.rule]
    return Culprit(tuple(broken), rule, tuple(g for g in rest if any(n in g for n in wrong)))


def ddmin(items: Sequence[Group], fails: Fails) -> list[Group]:
    """A subset that still fails and of which no single item can be left out; `items` themselves must fail."""
    kept, parts = list(items), 2
    while len(kept) >= 2:
        chunks = _split(kept, parts)
        rests = [[g for g in kept if g not in chunk] for chunk in chunks]
        smaller = next((c for c in chunks if fails(c)), None)
        if smaller is not None:
            kept, parts = smaller, 2
        elif parts > 2 and (rest := next((r for r in rests if fails(r)), None)) is not None:
            kept, parts = rest, parts - 1
        elif parts < len(kept):
            parts = min(len(kept), 2 * parts)
        else:
            break
    return kept


def _split(items: list[Group], parts: int) -> list[list[Group]]:
    bounds = [round(i * len(items) / parts) for i in range(parts + 1)]
    return [items[a:b] for a, b in pairwise(bounds)]
