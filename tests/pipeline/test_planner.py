from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import UsageError
from qcompile.pipeline import registry
from qcompile.pipeline.base import Kind, Pass, Stage
from qcompile.pipeline.planner import Plan, complete
from qcompile.pipeline.spec import format_pipeline
from qcompile.quant.spec import SCHEMES
from qcompile.target.catalog import TARGETS
from tests.pipeline.fakes import SCHEME, TARGET, FakeLower, NeedsSplit

PAIRS = [(t.name, s) for t in TARGETS.values() for s in t.schemes]
EQUIVALENT = [n for n in registry.names() if registry.pass_named(n).kind is Kind.EQUIVALENT]


def plan(text: str, target: str = "ort", scheme: str = "w8a8", **options: object) -> Plan:
    return complete(registry.parse(text), TARGETS[target], SCHEMES[scheme], **options)  # type: ignore[arg-type]


def names(made: Plan) -> list[str]:
    return [p.name for p in made.passes]


def walked(passes: tuple[Pass, ...], target: str, scheme: str) -> set[str]:
    """Walk the plan: what each pass needs must have been reached, what it stands behind must have run."""
    ran, stage = set[str](), Stage.SOURCE
    wanted = set(registry.wanted_forms(TARGETS[target], SCHEMES[scheme]))
    for p in passes:
        assert stage >= p.needs or (p.needs == Stage.FORMED and stage >= Stage.CANONICAL), p.name
        assert set(p.after) <= ran and (p.needs < Stage.FORMED or wanted <= ran), p.name
        ran.add(p.name)
        stage = max(stage, p.reaches)
    return ran


@pytest.mark.parametrize(("target", "scheme"), PAIRS)
def test_nothing_of_ones_own_is_completed_to_what_the_target_runs(target: str, scheme: str) -> None:
    made = plan("", target, scheme)
    assert all(made.inserted)
    assert set(TARGETS[target].lowering(SCHEMES[scheme])) <= walked(made.passes, target, scheme)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(EQUIVALENT), max_size=4), st.sampled_from(PAIRS))
def test_the_users_passes_never_move(wanted: list[str], pair: tuple[str, str]) -> None:
    made = plan(",".join(wanted), *pair)
    assert [p.name for p, i in zip(made.passes, made.inserted, strict=True) if not i] == wanted
    walked(made.passes, *pair)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(EQUIVALENT), max_size=4))
def test_exact_inserts_nothing(wanted: list[str]) -> None:
    made = plan(",".join(wanted), exact=True)
    assert names(made) == wanted and not any(made.inserted)


def test_a_completed_plan_is_a_fixed_point() -> None:
    made = plan("repq,smooth", "trt")
    again = plan(format_pipeline(made.passes), "trt")
    assert again.passes == made.passes and not any(again.inserted)


def test_what_a_pass_stands_behind_comes_directly_before_it() -> None:
    order = names(complete([NeedsSplit()], TARGET, SCHEME))
    assert order[:3] == ["canonicalize", "split-qkv", "needs-split"], "what is put in front has needs too"


def test_forms_come_in_the_registrys_order_and_once() -> None:
    order = names(plan("fold-bn,smooth", "ort"))
    forms = [n for n in order if n in registry.forms()]
    assert forms[:2] == ["canonicalize", "fold-bn"]
    rest = [n for n in registry.wanted_forms(TARGET, SCHEME) if n != "fold-bn"]
    assert forms[2:] == rest and order[len(forms)] == "smooth"


def test_what_the_model_went_through_is_not_done_again() -> None:
    assert not {"canonicalize", "fold-bn"} & set(names(plan("repq", done=("canonicalize", "fold-bn"))))
    assert {"canonicalize", "fold-bn"} <= set(names(plan("repq")))


def test_a_finished_model_needs_nothing() -> None:
    for target, scheme in PAIRS:
        assert plan("", target, scheme, done=names(plan("", target, scheme))).passes == ()


def test_passes_of_another_version_are_passed_over() -> None:
    assert plan("", done=("a-pass-of-tomorrow",)).passes == plan("").passes


def test_the_lowering_stands_in_its_order_whoever_wrote_its_parts() -> None:
    assert names(plan("fp16", "trt"))[-2:] == ["insert-qdq", "fp16"]
    assert names(plan("fp16", "trt", "fp16")) == ["canonicalize", "opset", "fuse-norm", "pad-heads", "fp16"]


@pytest.mark.parametrize("late", [n for n in EQUIVALENT if n != "canonicalize"])
def test_float_rewrites_stand_before_the_decisions(late: str) -> None:
    with pytest.raises(UsageError, match=rf"pass '{late}' .* must stand before 'annotate'; move it to the front"):
        plan(f"canonicalize,annotate,{late}", exact=True)


@pytest.mark.parametrize("late", ["annotate", "rtn", "bias-correct", "smooth"])
def test_nothing_but_lowering_stands_behind_the_quantizers(late: str) -> None:
    with pytest.raises(UsageError, match=f"pass '{late}' stands behind the insertion of Q/DQ nodes"):
        plan(f"insert-qdq,{late}")
    assert complete([*registry.parse("insert-qdq"), FakeLower()], TARGET, SCHEME).passes[-1] == FakeLower()


def test_the_order_is_checked_on_half_run_models_too() -> None:
    with pytest.raises(UsageError, match="must stand before 'annotate'"):
        plan("smooth", done=("canonicalize", "annotate"))


def test_every_stage_has_a_pass_that_reaches_it() -> None:
    for stage, name in registry.PROVIDERS.items():
        assert registry.pass_named(name).reaches is stage
    reached = {p.reaches for n in registry.names() if (p := registry.pass_named(n)).kind is Kind.LOWER}
    assert set(Stage) == {Stage.SOURCE, Stage.FORMED, *registry.PROVIDERS, Stage.LOWERED} and Stage.LOWERED in reached


def test_the_order_of_forms_names_all_of_them() -> None:
    ours = {n for n in registry.names() if registry.pass_named(n).is_form()}
    assert set(registry.forms()) == ours
