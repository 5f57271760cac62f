from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from qcompile.calib.observe import AbsMax, MinMax, MinMaxStat, Probe, Stat
from qcompile.errors import GateError, ModelError, VerifyError
from qcompile.ir.edit import new_node
from qcompile.ir.model import Model
from qcompile.pipeline.base import Comparison, Pass, PassContext
from qcompile.pipeline.runner import Failure, Ran, Runner, Starts, drive, without_data
from qcompile.structure.core import once
from tests.ir import tiny
from tests.pipeline.fakes import (
    CountingStatistics,
    Fake,
    FakeFit,
    FakeForm,
    FakeLower,
    FakeNote,
    FixedComparator,
    Other,
    ask_absmax,
    context,
    scale_weight,
)


def model() -> Model:
    return Model.from_proto(tiny.linear())


def run(
    passes: list[Pass], runner: Runner | None = None, source: Model | None = None, answer: Any = None, **options: Any
) -> tuple[Model, list[Any]]:
    steps = (runner or Runner()).steps(source or model(), passes, context(), **options)
    return drive(steps, answer or CountingStatistics())


def sweeps(*passes: Pass) -> list[list[str]]:
    """Which tensors each sweep asked for."""
    statistics = CountingStatistics()
    run(list(passes), answer=statistics)
    return [sorted(p.tensor for p in call) for call in statistics.calls]


# statistics


def test_one_sweep_answers_all_passes() -> None:
    assert sweeps(Fake(asks=("a",)), Fake(asks=("b",)), Fake(asks=("a", "c"))) == [["a", "b", "c"]]


def test_a_tensor_that_will_move_is_not_asked_for_early() -> None:
    assert sweeps(Fake(asks=("a",), touches=("b",), changed=("b",)), ask_absmax("b")) == [["a"], ["b"]]


def test_extremes_of_a_tensor_that_will_move_are_asked_for_early() -> None:
    assert sweeps(Fake(asks=("a",), touches=("b",), maps=("b",)), Fake(asks=("b",))) == [["a", "b"]], "they follow the map"


def test_passes_without_probes_cost_no_sweep() -> None:
    assert sweeps(Fake(), Fake(asks=("a",))) == [["a"]]
    assert sweeps(Fake(), Fake()) == []


def test_what_a_pass_leaves_alone_is_not_measured_again() -> None:
    assert sweeps(Fake(asks=("a",), changed=("b",)), Fake(asks=("a",))) == [["a"]]


def test_a_changed_tensor_is_measured_again() -> None:
    assert sweeps(Fake(asks=("a",), touches=("a",), changed=("a",)), Fake(asks=("a",))) == [["a"], ["a"]]


def test_extremes_follow_a_change_of_variable() -> None:
    seen: dict[Probe, Stat] = {}

    def keep(model: Model, ctx: PassContext) -> bool:
        seen.update(ctx.told.items())
        return True

    assert sweeps(Fake(asks=("a",), touches=("a",), maps=("a",)), Fake(asks=("a",), act=keep)) == [["a"]]
    stat = seen[Probe("a", MinMax(-1))]
    assert isinstance(stat, MinMaxStat), "(x - 1) / 2 of [-1, 3]"
    assert np.array_equal(stat.lo, np.full(4, -1.0)) and np.array_equal(stat.hi, np.full(4, 1.0))


def test_what_cannot_follow_a_map_is_measured_again() -> None:
    first = replace(ask_absmax("a"), touches=("a",), maps=("a",))
    assert sweeps(first, ask_absmax("a")) == [["a"], ["a"]]


def test_equal_tensors_under_two_observers_are_two_probes() -> None:
    statistics = CountingStatistics()
    run([Fake(asks=("a",)), ask_absmax("a")], answer=statistics)
    assert [sorted(type(p.observer).__name__ for p in c) for c in statistics.calls] == [[AbsMax.__name__, MinMax.__name__]]


def test_a_probe_without_data_says_what_to_give() -> None:
    with pytest.raises(GateError, match="pass 'fake' needs calibration data; give some with --calib"):
        run([Fake(asks=("a",))], answer=without_data)


def test_a_pass_sees_only_what_it_asked_for() -> None:
    def check(model: Model, ctx: PassContext) -> bool:
        assert [p.tensor for p, _ in ctx.told.items()] == ["a"]
        return True

    run([Fake(asks=("a",), act=check), Fake(asks=("b",))])


# verification


@pytest.mark.parametrize(
    ("p", "compared"),
    [(Fake(), True), (FakeLower(), True), (FakeNote(), False), (Fake(act=lambda m, c: False), False), (FakeFit(), False)],
)
def test_what_is_compared(p: Pass, compared: bool) -> None:
    compare = FixedComparator(1e-7)
    _, (report,) = run([p], Runner(comparator=compare))
    assert bool(compare.seen) is compared
    assert (report.relative_error == 1e-7) is compared


@pytest.mark.parametrize("error", [6e-6, float("nan"), float("inf")])
def test_a_pass_that_moves_the_outputs_is_stopped(error: float) -> None:
    with pytest.raises(
        VerifyError, match=r"pass 'fake' moved the outputs by .* more than 5e-06; leave it out of --passes, or --verify end"
    ):
        run([Fake()], Runner(comparator=FixedComparator(error)))


class Kinds(FixedComparator):
    """Two models are one where their operators are."""

    def compare(self, reference: Model, candidate: Model) -> Comparison:
        error = float([n.op_type for n in reference.graph] != [n.op_type for n in candidate.graph])
        return Comparison(error, 40.0, 9, {"y": error})


def chain(length: int) -> Model:
    """x -> Relu n[0] -> ... -> Relu n[length - 1] -> y."""
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"], name=f"n[{i}]") for i in range(length)]
    ends = [helper.make_tensor_value_info(name, 1, ["N", 4]) for name in ("t0", f"t{length}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:])
    return Model.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))


@pytest.mark.parametrize("worst", [0, 3, 6])
def test_the_first_site_that_moves_the_outputs_is_named(worst: int) -> None:
    def act(model: Model, ctx: PassContext) -> bool:
        for i, n in enumerate(n for n in model.graph if ctx.selection.excluded(n) is None):
            ctx.remarks.applied(str(n.name), f"rewritten as number {i}")
            n.op_type = "Abs" if str(n.name) in (f"n[{worst}]", "n[6]") else n.op_type
        return True

    with pytest.raises(VerifyError, match="moved the outputs") as error:
        run([Fake(act=act)], Runner(comparator=Kinds()), chain(7))
    assert f"the first site at which they move is 'n[{worst}]'" in str(error.value)
    assert f"leave the site alone with --keep-float 'n[[]{worst}]', or leave it out of --passes" in str(error.value)


def test_no_site_is_named_where_leaving_all_alone_does_not_help() -> None:
    def act(model: Model, ctx: PassContext) -> bool:
        for n in model.graph:
            ctx.remarks.applied(str(n.name), "rewritten")
            n.op_type = "Abs"
        return True

    with pytest.raises(VerifyError, match="moved the outputs") as error:
        run([Fake(act=act)], Runner(comparator=Kinds()), chain(3))
    assert "first site" not in str(error.value) and "--keep-float" not in str(error.value)


def test_rounding_is_no_breach() -> None:
    _, (report,) = run([Fake()], Runner(comparator=FixedComparator(5e-6)))
    assert report.verified == "equal within tolerance"


def test_lowering_is_measured_against_the_source_and_not_gated() -> None:
    compare, source = FixedComparator(0.3), model()
    run([FakeFit(act=scale_weight), FakeLower(act=scale_weight)], Runner(comparator=compare, verify="each"), source)
    assert compare.seen[0][0].digest() == source.digest()


def test_equivalence_is_measured_against_the_step_before() -> None:
    compare, source = FixedComparator(), model()
    after, _ = run([Fake(act=scale_weight), Fake(act=scale_weight)], Runner(comparator=compare), source)
    first, second = compare.seen
    assert first[0].digest() == source.digest() and first[1].digest() == second[0].digest()
    assert second[0].digest() != source.digest() and second[1].digest() == after.digest()
    assert len(compare.ran) <= 4, "no model runs twice"


def test_the_source_is_never_touched() -> None:
    source = model()
    digest = source.digest()
    after, _ = run([Fake(act=scale_weight)], Runner(), source)
    assert source.digest() == digest and after.digest() != digest


def test_verify_end_compares_once() -> None:
    compare = FixedComparator(1e-7)
    _, reports = run([Fake(), Fake()], Runner(comparator=compare, verify="end"))
    assert len(compare.seen) == 1 and reports[-1].verified == "compared at the end"


def test_verify_end_holds_float_pipelines_to_the_bound() -> None:
    with pytest.raises(VerifyError, match="the whole pipeline"):
        run([Fake(), Fake()], Runner(comparator=FixedComparator(1e-3), verify="end"))
    run([Fake(), FakeLower()], Runner(comparator=FixedComparator(1e-3), verify="end"))


def test_verify_off_compares_nothing() -> None:
    compare = FixedComparator(1.0)
    run([Fake()], Runner(comparator=compare, verify="off"))
    assert not compare.seen


class Changes(Fake):
    """A surgery that means to change the function."""

    changes_function = True


def test_a_change_on_purpose_starts_a_new_baseline() -> None:
    compare = FixedComparator()
    after, reports = run([Changes(act=scale_weight), FakeLower()], Runner(comparator=compare))
    assert reports[0].verified == "not verified: changes the function on purpose"
    assert len(compare.seen) == 1 and compare.seen[0][0].digest() == after.digest()


def test_a_change_on_purpose_that_changed_nothing_keeps_the_baseline() -> None:
    source, compare = model(), FixedComparator()
    run([Changes(act=lambda m, c: False), FakeLower()], Runner(comparator=compare), source)
    assert compare.seen[0][0].digest() == source.digest()


def test_the_step_behind_a_change_on_purpose_is_measured_against_it() -> None:
    compare = FixedComparator()
    run([Fake(act=scale_weight), Changes(act=scale_weight), Other(act=scale_weight)], Runner(comparator=compare))
    changed, _ = run([Fake(act=scale_weight), Changes(act=scale_weight)], Runner())
    assert compare.seen[-1][0].digest() == changed.digest()


def test_the_step_behind_a_fit_is_measured_against_it() -> None:
    compare = FixedComparator()
    run([Fake(act=scale_weight), FakeFit(act=scale_weight), Other(act=scale_weight)], Runner(comparator=compare))
    fitted, _ = run([Fake(act=scale_weight), FakeFit(act=scale_weight)], Runner())
    assert compare.seen[-1][0].digest() == fitted.digest()


# failures


def test_a_failing_pass_hands_over_the_model_before_it() -> None:
    failures: list[Failure] = []

    def crash(model: Model, ctx: PassContext) -> bool:
        scale_weight(model, ctx)
        raise IndexError("list index out of range")

    def remember(failure: Failure) -> str:
        failures.append(failure)
        return "\n  reproduce: qcompile ..."

    runner = Runner(on_failure=remember)
    with pytest.raises(VerifyError, match=r"(?s)pass 'other' failed: IndexError: list index out of range.*reproduce: qcompile"):
        run([Fake(act=scale_weight), Other(act=crash)], runner)
    middle, _ = run([Fake(act=scale_weight)], Runner())
    assert failures[0].model.digest() == middle.digest(), "the first pass's work is in it, the failed pass's is not"


def test_our_own_errors_keep_their_class() -> None:
    def refuse(model: Model, ctx: PassContext) -> bool:
        raise ModelError("no way; go back")

    with pytest.raises(ModelError, match="no way; go back"):
        run([Fake(act=refuse)])


def test_a_broken_graph_is_found_at_once() -> None:
    def lose_order(model: Model, ctx: PassContext) -> bool:
        last = model.graph.node(-1)
        model.graph.insert_before(model.graph.node(0), [new_node(model.graph, "Relu", [last.outputs[0]], name="early")])
        return True

    with pytest.raises(VerifyError, match="pass 'fake': node 'early' reads 'y' before it is made"):
        run([Fake(act=lose_order)])


def test_a_model_whose_own_rounding_moves_it_further_sets_the_bound() -> None:
    compare = FixedComparator(1e-4, rounding=2e-5)
    _, (first, second) = run([Fake(act=scale_weight), Other(act=scale_weight)], Runner(comparator=compare))
    assert first.verified == second.verified == "equal within tolerance" and len(compare.noisy) == 1
    with pytest.raises(VerifyError, match=r"moved the outputs by 0.00024 of their size \(output 'y'\), more than 0.0002;"):
        run([Fake(act=scale_weight)], Runner(comparator=FixedComparator(2.4e-4, rounding=2e-5)))


def test_an_ordinary_models_noise_is_never_measured() -> None:
    compare = FixedComparator(1e-6, rounding=1.0)
    run([Fake(act=scale_weight)], Runner(comparator=compare))
    assert not compare.noisy


def test_a_failure_names_the_sites_and_the_way_on() -> None:
    def at_two(model: Model, ctx: PassContext) -> bool:
        for node in ("a", "b", "c", "d"):
            ctx.remarks.applied(node, "done")
        return scale_weight(model, ctx)

    with pytest.raises(VerifyError, match=r"\(it worked at a, b, c and 1 more\); leave it out of --passes, or --verify end"):
        run([Fake(act=at_two)], Runner(comparator=FixedComparator(1.0)))
    with pytest.raises(VerifyError, match="name the passes without it and add --exact"):
        run([FakeForm(act=at_two)], Runner(FixedComparator(1.0)))


def test_a_verify_failure_is_reproducible_too() -> None:
    seen: list[Failure] = []
    source = model()
    runner = Runner(comparator=FixedComparator(1.0), on_failure=lambda f: seen.append(f) or "\n  reproduce: it")
    with pytest.raises(VerifyError, match="reproduce: it"):
        run([Fake(act=scale_weight)], runner, source)
    assert seen[0].model.digest() == source.digest() and seen[0].spec == "fake"


# strict, remarks, instruments


def test_strict_fails_for_a_users_pass_that_changed_nothing() -> None:
    def skip(model: Model, ctx: PassContext) -> bool:
        ctx.remarks.missed("fc", "its weight is shared")
        ctx.remarks.missed("fc2", "its weight is shared")
        return False

    with pytest.raises(
        GateError, match=r"--strict: pass 'fake' changed nothing \(its weight is shared\); remove it, or drop --strict"
    ):
        run([Fake(act=skip)], Runner(strict=True))
    run([Fake(act=skip)], Runner(strict=True), user=[False])
    run([Fake(act=skip)], Runner())


def test_a_pass_that_matched_nothing_says_so() -> None:
    _, (report,) = run([Fake(act=lambda m, c: False)])
    assert [(r.kind, r.reason) for r in report.remarks] == [("note", "no site matched")]


def test_each_pass_has_its_own_remarks() -> None:
    def speak(model: Model, ctx: PassContext) -> bool:
        ctx.remarks.applied("n", ctx.remarks.pass_name, gain=1.5)
        return True

    _, reports = run([Fake(act=speak), Other(act=speak)])
    assert [[(r.pass_name, r.reason, r.numbers) for r in x.remarks] for x in reports] == [
        [("fake", "fake", {"gain": 1.5})],
        [("other", "other", {"gain": 1.5})],
    ]


def test_news_come_in_order() -> None:
    told: list[str] = []

    def hear(event: Starts | Ran) -> None:
        told.append(f"{event.spec} {event.index}/{event.total}" if isinstance(event, Starts) else f"done {event.report.spec}")

    _, reports = drive(Runner().steps(model(), [Fake(), Other()], context()), news=hear)
    assert told == ["fake 0/2", "done fake", "other 1/2", "done other"]
    assert all(r.seconds >= 0 and r.peak_rss_mb > 0 for r in reports)


# forms


def test_forms_that_stand_together_are_compared_once() -> None:
    compare, source = FixedComparator(1e-7), model()
    after, reports = run([FakeForm(act=scale_weight)] * 3 + [Fake(act=scale_weight)], Runner(compare), source)
    assert len(compare.seen) == 2 and compare.seen[0][0].digest() == source.digest()
    assert [r.relative_error for r in reports] == [1e-7] * 4
    assert compare.seen[1][1].digest() == after.digest() and len(compare.ran) == 3, "no model runs twice"


def test_forms_at_the_end_are_compared_too() -> None:
    with pytest.raises(VerifyError, match="pass 'fake-form' moved the outputs"):
        run([FakeForm(act=scale_weight)], Runner(FixedComparator(1.0)))


@dataclass
class MovedFrom(FixedComparator):
    """Outputs are those of the weight; they differ once it has been scaled `limit` times."""

    limit: int = 0

    def compare(self, reference: Model, candidate: Model) -> Comparison:
        self.seen.append((reference, candidate))
        ratio = _weight(candidate) / _weight(reference)
        error = 1.0 if ratio > 1.5 ** (self.limit - 0.5) else 0.0
        return Comparison(error, 40.0, 9, {"y": error})


def _weight(m: Model) -> float:
    tensor = next(n for n in m.graph if n.op_type == "MatMul").inputs[1].const_value  # type: ignore[union-attr]
    return float(np.abs(tensor.numpy()).max())  # type: ignore[union-attr]


@pytest.mark.parametrize("culprit", range(1, 8))
def test_the_form_that_moves_the_outputs_is_found_by_bisection(culprit: int) -> None:
    failures: list[Failure] = []
    forms = [FakeForm(asks=(), touches=(str(i),), act=scale_weight) for i in range(7)]
    compare = MovedFrom(limit=culprit)
    runner = Runner(compare, on_failure=lambda f: failures.append(f) or "\n  reproduce: it")
    with pytest.raises(VerifyError, match="pass 'fake-form' moved the outputs"):
        run([*forms, Fake()], runner)
    (failure,) = failures
    assert round(np.log(_weight(failure.model) / _weight(model())) / np.log(1.5)) == culprit - 1
    assert len(compare.seen) <= 4, "one comparison and log2(7) more"


# what finders know


def test_finders_look_once_at_a_version_of_the_graph() -> None:
    looked: list[int] = []

    @once
    def find(graph: ir.Graph) -> int:
        looked.append(len(graph))
        return len(looked)

    def look(m: Model, ctx: PassContext) -> bool:
        return find(m.graph) < 0

    def change(m: Model, ctx: PassContext) -> bool:
        find(m.graph)
        return scale_weight(m, ctx)

    run([FakeNote(act=look), FakeNote(act=look), Fake(act=change), FakeNote(act=look), FakeNote(act=look)])
    assert len(looked) == 3, "before the change, inside the pass that changes, behind it"
