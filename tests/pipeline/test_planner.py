from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import UsageError
from qcompile.pipeline import registry
from qcompile.pipeline.base import Fact, Kind, Pass
from qcompile.pipeline.planner import PROVIDERS, Plan, complete, final_facts
from qcompile.pipeline.spec import format_pipeline
from qcompile.quant.spec import SCHEMES
from qcompile.target.catalog import TARGETS
from tests.pipeline.fakes import SCHEME, TARGET, Forgets, NeedsSplit

PAIRS = [(t.name, s) for t in TARGETS.values() for s in t.schemes]
EQUIVALENT = [n for n in registry.names() if registry.provider(n).kind is Kind.EQUIVALENT]


def plan(text: str, target: str = "ort", scheme: str = "w8a8", **options: object) -> Plan:
    return complete(registry.parse(text), TARGETS[target], SCHEMES[scheme], **options)  # type: ignore[arg-type]


def names(made: Plan) -> list[str]:
    return [p.name for p in made.passes]


def facts(passes: tuple[Pass, ...], target: str, scheme: str) -> set[Fact]:
    """Walk the plan: what each pass requires must hold before it."""
    held: set[Fact] = set()
    for p in passes:
        assert p.required(TARGETS[target], SCHEMES[scheme]) <= held, p.name
        held = (held - p.invalidates) | p.establishes
    return held


@pytest.mark.parametrize(("target", "scheme"), PAIRS)
def test_nothing_of_ones_own_is_completed_to_the_targets_final_facts(target: str, scheme: str) -> None:
    made = plan("", target, scheme)
    assert all(made.inserted)
    assert set(final_facts(TARGETS[target], SCHEMES[scheme])) <= facts(made.passes, target, scheme)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(EQUIVALENT), max_size=4), st.sampled_from(PAIRS))
def test_the_users_passes_never_move(wanted: list[str], pair: tuple[str, str]) -> None:
    made = plan(",".join(wanted), *pair)
    assert [p.name for p, i in zip(made.passes, made.inserted, strict=True) if not i] == wanted
    facts(made.passes, *pair)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(EQUIVALENT), max_size=4))
def test_exact_inserts_nothing(wanted: list[str]) -> None:
    made = plan(",".join(wanted), exact=True)
    assert names(made) == wanted and not any(made.inserted)


def test_a_completed_plan_is_a_fixed_point() -> None:
    made = plan("repq,smooth", "trt")
    again = plan(format_pipeline(made.passes), "trt")
    assert again.passes == made.passes and not any(again.inserted)


def test_a_provider_comes_directly_before_the_pass_that_needs_it() -> None:
    made = complete([NeedsSplit()], TARGET, SCHEME)
    order = names(made)
    assert order[order.index("needs-split") - 1] == "split-qkv"
    assert order.index("canonicalize") < order.index("split-qkv"), "providers have requirements too"


def test_an_invalidated_fact_is_provided_again() -> None:
    made = complete([Forgets(), NeedsSplit()], TARGET, SCHEME)
    assert names(made)[:5] == ["canonicalize", "forgets", "canonicalize", "split-qkv", "needs-split"]


def test_facts_that_the_model_holds_are_not_provided() -> None:
    held = frozenset({Fact.CANONICAL, Fact.BN_FOLDED})
    assert not {"canonicalize", "fold-bn"} & set(names(plan("repq", held=held)))
    assert {"canonicalize", "fold-bn"} <= set(names(plan("repq")))


def test_a_finished_model_needs_nothing() -> None:
    assert plan("", "ort", held=frozenset(Fact)).passes == ()


@pytest.mark.parametrize("late", [n for n in EQUIVALENT if n != "canonicalize"])
def test_float_rewrites_stand_before_the_decisions(late: str) -> None:
    with pytest.raises(UsageError, match=rf"pass '{late}' .* must stand before 'annotate'; move it to the front"):
        plan(f"canonicalize,annotate,{late}", exact=True)


@pytest.mark.parametrize("late", ["annotate", "rtn", "bias-correct", "smooth"])
def test_nothing_but_lowering_stands_behind_the_quantizers(late: str) -> None:
    with pytest.raises(UsageError, match=f"pass '{late}' stands behind the insertion of Q/DQ nodes"):
        plan(f"insert-qdq,{late}")


def test_the_order_is_checked_on_half_run_models_too() -> None:
    with pytest.raises(UsageError, match="must stand before 'annotate'"):
        plan("smooth", held=frozenset({Fact.CANONICAL, Fact.DECIDED}))


def test_every_fact_has_a_provider_that_establishes_it() -> None:
    assert set(PROVIDERS) == set(Fact)
    for fact, name in PROVIDERS.items():
        assert fact in registry.provider(name).establishes
