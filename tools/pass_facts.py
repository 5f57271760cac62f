"""What pages of passes say beyond the docstring: where a pass acts, which statistics it reads, what it costs, what it brought.

Nothing here is written by hand: targets tell which forms and lowerings they want, tests/goldens/contracts.table where a pass
changes something; statistics, sweeps and operators are seen on small models; figures are rows of docs/guide/passes-compared.md.
"""

from __future__ import annotations

import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from qcompile.calib.observe import Observer
from qcompile.ir.model import Model
from qcompile.pipeline import registry
from qcompile.pipeline.base import Kind, Needs, Pass
from qcompile.pipeline.planner import complete
from qcompile.pipeline.runner import Runner, drive
from qcompile.pipeline.site import SitePass
from qcompile.quant.spec import SCHEMES, Scheme
from qcompile.target.catalog import TARGETS
from qcompile.target.target import Target

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the tests have the models that passes are seen on
MEASURED = ROOT / "docs" / "passes" / "measured.toml"
SMALL = ("block", "tokens", "convs", "mixed", "stem", "joined", "biased")
SEEN = 3


def facts(name: str) -> list[str]:
    """Lines of the list on a pass's page."""
    p = registry.pass_named(name)
    found = [inserted(p), changed(name), *unfit(p), reads(name), costs(name), claims(p), measured(name)]
    return [f"* {fact}" for fact in found if fact]


# ---- from the code ------------------------------------------------------------------------------------------------


def inserted(p: Pass) -> str:
    """Where the planner puts it in."""
    if p.name in registry.PROVIDERS.values():
        return "inserted: wherever a pass needs what it makes"
    if p.name in (registry.UNIFY, registry.IMPORT):
        return "inserted: where the model holds Q/DQ nodes"
    verb = "forms" if p.is_form() else "lowering"
    inserted = _where(lambda t, s: p.name in getattr(t, verb)(s))
    default = _where(lambda t, s: p.name in [q.name for q in registry.parse(t.default(s))])
    if default:
        return f"runs: by default for {default}; else where you name it"
    return f"inserted: {inserted}" if inserted else "runs: where you name it"


def _where(true: Callable[[Target, Scheme], bool]) -> str:
    """The targets and schemes for which something holds."""
    groups: dict[str, list[str]] = {}
    for t in TARGETS.values():
        if some := [s for s in t.schemes if true(t, SCHEMES[s])]:
            groups.setdefault(_schemes(some, t.schemes), []).append(f"`{t.name}`")
    return "; ".join(f"{', '.join(targets)} ({schemes})" for schemes, targets in groups.items())


def _schemes(some: Sequence[str], every: Sequence[str]) -> str:
    others = [s for s in every if s not in some]
    if not others:
        return "all schemes"
    return ", ".join(some) if len(some) <= len(others) else f"all schemes but {', '.join(others)}"


def unfit(p: Pass) -> Iterator[str]:
    """Schemes and targets for which it says that it has nothing to do."""
    if not isinstance(p, SitePass):
        return
    from tests.passes.running import context

    pairs = [(t.name, s) for t in TARGETS.values() for s in t.schemes]
    reasons = {pair: p.unfit(context(*pair)) for pair in pairs}
    for reason in dict.fromkeys(filter(None, reasons.values())):
        schemes = dict.fromkeys(s for (_, s), r in reasons.items() if r == reason)
        yield f"does nothing: under {', '.join(schemes)} ({reason})"


def claims(p: Pass) -> str:
    """Whether it claims what it rewrites."""
    return "claims: its sites; later passes with claims leave them alone" if isinstance(p, SitePass) and p.claims else ""


# ---- from the contracts -------------------------------------------------------------------------------------------


@cache
def contracts() -> dict[str, list[tuple[str, str, bool]]]:
    """Pass -> (model, target, whether it changes the model) of each tested pair."""
    from tests.passes.contracts import MODELS, READERS, TABLE
    from tests.passes.models import QUANTIZED

    lines = [[c.strip() for c in line.split("|")] for line in TABLE.read_text(encoding="utf-8").splitlines()]
    pairs = [(model, target) for model, targets in MODELS.items() for target in targets]
    found = {name: [(*p, c != ".") for p, c in zip(pairs, "".join(cells), strict=True)] for name, *cells in lines[1:]}
    return {
        name.removesuffix("{always}"): [row for row in rows if (row[0] in QUANTIZED) == (name in READERS)]
        for name, rows in found.items()
    }


def changed(name: str) -> str:
    """How many test models it changes, by target."""
    cells = contracts().get(name, [])
    counts = {t: [does for _, target, does in cells if target == t] for t in dict.fromkeys(target for _, target, _ in cells)}
    shown = [f"{sum(c)} of {len(c)} for `{t}`" for t, c in counts.items() if c]
    return f"changes: of the test models {', '.join(shown)}" if shown else ""


# ---- seen ---------------------------------------------------------------------------------------------------------


def _models(name: str) -> list[tuple[str, str]]:
    """A few small models and targets for which the pass changes something."""
    alive = [(m, t) for m, t, does in contracts().get(name, []) if does and m in SMALL]
    first = {t for _, t in alive[:1]}
    return [(m, t) for m, t in alive if t in first][:SEEN]


@cache
def observers(spec: str, scheme: str = "w8a8") -> frozenset[Observer[Any]]:
    """What a pass asks of the small models."""
    from tests.passes.running import context, fixture_step

    (p,) = registry.parse(spec)
    steps = [(fixture_step(m, spec, t, scheme), t) for m, t in _models(p.name)]
    return frozenset(probe.observer for step, t in steps for probe in p.probes(step.before, context(t, scheme)))


def reads(name: str) -> str:
    """The kinds of statistics, as `calibration.md` calls them; with other options than the default ones, too."""
    from tests.passes.contracts import VARIANTS

    fewer_bits = observers(name, "w4a8") if registry.pass_named(name).kind is Kind.FIT else frozenset[Observer[Any]]()
    plain, fewer = _words(observers(name)), _words(fewer_bits)
    others = {w for v in VARIANTS if v.startswith(f"{name}{{") for w in _words(observers(v))}
    parts = [", ".join(sorted(plain)) or "no data"]
    parts += [f"with other options also {', '.join(sorted(others - plain))}"] if others - plain else []
    parts += [f"below 8 bits also {', '.join(sorted(fewer - plain))}"] if fewer - plain else []
    link = " ([statistics](../guide/calibration.md#statistics-in-a-file))" if plain | others | fewer else ""
    return f"reads: {'; '.join(parts)}{link}"


def _words(found: Iterable[Observer[Any]]) -> set[str]:
    return {_word(o) for o in found}


def _word(o: Observer[Any]) -> str:
    axis, heads = getattr(o, "axis", None), getattr(o, "heads", None)
    part = "by head" if heads is not None else "by channel" if axis is not None else "of the tensor"
    return f"`{o.kind}`" + (f" {part}" if o.kind in ("minmax", "absmax", "moments") else "")


def costs(name: str) -> str:
    """Sweeps that it adds to a compilation, and operators that were not there."""
    from tests.passes.running import fixture_step

    steps = [fixture_step(m, name, t) for m, t in _models(name)]
    new = sorted({op for s in steps for op in _operators(s.after) - _operators(s.before)})
    nodes = f"new nodes {', '.join(new)}" if new else "no new node"
    return f"costs: {sweeps(name)}; {nodes}"


def _operators(model: Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def sweeps(name: str) -> str:
    """How many more sweeps a compilation makes for it."""
    if not observers(name):
        return "no sweep"
    plain, given = ([_sweeps(text, *pair) for pair in _models(name)] for text in ("", name))
    more = max(len(b) - len(a) for a, b in zip(plain, given, strict=True))
    own = max(by.count(name) for by in plain)
    if more <= 0 and own == 0:
        return "no sweep of its own: what it reads comes with that of other passes"
    return f"{more or own} sweep{'s' * (max(more, own) > 1)}"


@cache
def _sweeps(text: str, model: str, target: str) -> list[str]:
    """Which passes the sweeps of a compilation are for."""
    from tests.passes.models import fixture, fixture_arrays
    from tests.passes.running import Sweeps, context, dataset

    ctx, by = context(target), list[str]()
    collect = Sweeps(dataset(fixture_arrays(model)), threads=1).collect

    def answer(needs: Needs) -> Any:
        by.append(needs.by)
        return collect(needs.model, needs.probes)

    drive(Runner(verify="off").steps(fixture(model), complete(registry.parse(text), ctx.target, ctx.scheme).passes, ctx), answer)
    return by


# ---- measured -----------------------------------------------------------------------------------------------------


def measured(name: str) -> str:
    """Without and with it, on one model."""
    row = tomllib.loads(MEASURED.read_text(encoding="utf-8")).get(name)
    if row is None:
        return ""
    model = f"`{row['model']}`" + ("" if row["variant"] == "plain" else f" with {row['variant']}")
    return (
        f"measured: {model}, {row['scheme']}: {row['without']} dB without, {row['with']} dB with it"
        " ([passes compared](../guide/passes-compared.md))"
    )
