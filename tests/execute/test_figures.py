from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from qcompile.errors import InputError
from qcompile.execute.compare import coarsest_step, comparator
from qcompile.execute.figures import OutputTally, figures, worst_db
from qcompile.execute.session import as_array
from qcompile.ir.jumps import Nature
from qcompile.ir.model import Model
from qcompile.report import OutputFigure

RNG = np.random.default_rng(0)


def figure(reference: Any, candidate: Any, nature: Nature | None = None) -> OutputFigure:
    tally = OutputTally("y", nature or Nature())
    tally.add(np.asarray(reference), np.asarray(candidate))
    return tally.figure()


def test_floats_are_measured_in_db() -> None:
    x = RNG.normal(size=(4, 5)).astype(np.float32)
    assert figure(x, x * np.float32(1.01)) == OutputFigure("y", sqnr_db=pytest.approx(40, abs=0.01))


@pytest.mark.parametrize("kind", [np.int64, np.bool_, np.str_])
def test_others_by_the_share_of_equal_entries(kind: Any) -> None:
    assert figure(np.array([0, 1, 1, 1], kind), np.array([1, 1, 1, 1], kind)) == OutputFigure("y", equal=0.75)


def test_floats_that_are_nothing_but_indices_too() -> None:
    found = figure([0.0, 5.0], [0.0, 6.0], Nature(True, made="ArgMax"))
    assert (found.equal, found.sqnr_db, found.note) == (0.5, None, "jumps with ArgMax")


def test_another_number_of_rows_counts_what_is_missing() -> None:
    found = figure(np.ones((4, 3)), np.ones((3, 3)), Nature(True, behind="NonMaxSuppression"))
    assert found.equal == 0.75 and found.sqnr_db is None


def test_what_is_not_finite_in_the_reference_is_left_out() -> None:
    assert figure([1.0, -np.inf, np.nan], [1.0, -np.inf, np.nan]).sqnr_db == 200
    assert (figure([1.0, 2.0], [1.0, np.nan]).sqnr_db or 0) < -100


def test_random_outputs_have_no_figure() -> None:
    found = figure([1.0], [2.0], Nature(True, random="RandomNormalLike"))
    assert found == OutputFigure("y", note="differs from run to run (RandomNormalLike)")


def test_the_worst_comes_first() -> None:
    found = [OutputTally(n, Nature(True, random=r)) for n, r in (("any", "Bernoulli"), ("good", ""), ("ids", ""), ("bad", ""))]
    for tally, noise in zip(found, (0.1, 0.01, 0, 0.1), strict=True):
        x = np.ones(4) if noise else np.ones(4, np.int64)
        tally.add(x, x + noise)
    listed = figures(found)
    assert [f.name for f in listed] == ["bad", "good", "ids", "any"] and worst_db(listed) == pytest.approx(20)
    assert worst_db(listed[2:]) is None


def test_sequences_and_maps_are_strung_together() -> None:
    assert as_array([np.ones((2, 2)), np.zeros(1)]).tolist() == [1, 1, 1, 1, 0]
    assert as_array([{0: 0.25, 1: 0.75}]).tolist() == [0.25, 0.75] and as_array([]).size == 0


HEAD = """<ir_version: 9, opset_import: ["" : 17]> g (float[N,8] x) => (int64[N,1] best, float[N,8] h, float[N,8] small)
<float[1] tiny = {0.001}> { h = MatMul(x, w) best = ArgMax <axis = 1> (h) small = Mul(h, tiny) }"""


def head(error: float, small: float = 0.0) -> Model:
    proto = parser.parse_model(HEAD.replace("0.001", str(0.001 + small)))
    w = np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(w + np.float32(error) * np.roll(w, 1, 0), "w"))
    return Model.from_proto(proto)


def feeds() -> list[dict[str, NDArray[Any]]]:
    return [{"x": RNG.normal(size=(8, 8)).astype(np.float32)}]


def test_every_output_is_compared_and_indices_apart() -> None:
    compare = comparator(feeds(), 0)
    distance = compare.compare(compare.outputs(head(0.0)), compare.outputs(head(0.0, small=0.0005)))
    assert [o.name for o in distance.outputs] == ["small", "h", "best"], "the second figure hid behind the first before"
    assert distance.sqnr_db == pytest.approx(20 * np.log10(2), abs=0.01)
    assert distance.outputs[1].sqnr_db == 200 and distance.outputs[2].equal == 1.0
    assert set(distance.errors) == {"h", "small"} and distance.relative_error == pytest.approx(0.5, rel=1e-3)


def test_indices_that_change_are_no_relative_error() -> None:
    compare = comparator(feeds(), 0)
    distance = compare.compare(compare.outputs(head(0.0)), compare.outputs(head(0.5)))
    assert 0 < (distance.relative_error or 0) < 1 and (distance.outputs[-1].equal or 1) < 1


def test_the_noise_of_a_model_is_what_optimizations_move() -> None:
    w = RNG.normal(size=(64, 64)).astype(np.float32)
    text = """<ir_version: 9, opset_import: ["" : 17]> g (float[N,64] x) => (float[N,64] y, float[N,64] h)
    { h = MatMul(x, w) a = Add(h, big) y = Sub(a, big) }"""
    proto = parser.parse_model(text)
    proto.graph.initializer.extend(
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.full(64, 1e3, np.float32), "big")]
    )
    model, compare = Model.from_proto(proto), comparator([{"x": RNG.normal(size=(4, 64)).astype(np.float32)}], 0)
    noise = compare.noise(model, compare.outputs(model))
    assert set(noise) == {"y", "h"} and all(0 <= n < 1e-3 for n in noise.values())


def indexed(low: float = 0.0) -> Model:
    """Rows of a table by indices that come as floats."""
    text = f"""<ir_version: 9, opset_import: ["" : 17]> g (float[N] x) => (float[N,8] y)
    <float[1] low = {{{low}}}> {{ i = Add(x, low) k = Cast <to = 7> (i) y = Gather(table, k) }}"""
    proto = parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(RNG.normal(size=(4, 8)).astype(np.float32), "table"))
    return Model.from_proto(proto)


def test_a_random_sample_that_the_model_refuses_is_a_real_one() -> None:
    samples = [{"x": np.array([0, 3], np.float32)}]
    compare = comparator(samples, 0)
    compare.feeds[-1] = {"x": np.array([1.5, 9], np.float32)}
    answers = compare.outputs(indexed())
    assert len(answers.runs) == 2 and np.array_equal(answers.runs[0][0], answers.runs[1][0])
    with pytest.raises(InputError, match="Gather"):
        compare.outputs(indexed(low=9.0))  # a later model that fails, fails


@pytest.mark.parametrize(("name", "number", "least"), [("float16", 10, 2.0**-10), ("bfloat16", 16, 2.0**-7), ("float", 1, 0.0)])
def test_a_16_bit_interface_rounds_that_far(name: str, number: int, least: float) -> None:
    text = f"""<ir_version: 9, opset_import: ["" : 17]> g (float[N,8] x) => ({name}[N,8] y) {{ y = Cast <to = {number}> (x) }}"""
    assert coarsest_step(Model.from_proto(parser.parse_model(text)).graph) == least
