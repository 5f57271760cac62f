"""smooth{search}: an alpha is taken for what it brings on rows that it was not fitted to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper

from qcompile.calib.observe import MinMax, MinMaxStat, Rows, RowsStat
from qcompile.ir.model import Model
from qcompile.passes.equivalent.smooth.search import Half, Types, best_alpha, halves
from qcompile.passes.equivalent.smooth.smooth import largest_of_rows, ratios
from qcompile.quant.qtype import INT8
from qcompile.quant.spec import QuantSpec
from qcompile.report import Remark
from tests.passes.measures import constants_of, outputs, sqnr_db
from tests.passes.models import built
from tests.passes.running import context, pipeline

node = helper.make_node
INPUTS, HIDDEN, FEW = 32, 96, 24
TYPES = Types(QuantSpec(INT8), INT8)


def rare() -> Model:
    """An MLP whose hidden channels are seldom active: their largest values are not among FEW samples."""
    rng = np.random.default_rng(0)
    held = {"w1": rng.standard_normal((INPUTS, HIDDEN)), "c1": np.full(HIDDEN, -4.0), "w2": rng.standard_normal((HIDDEN, 16))}
    nodes = [
        node("Gemm", ["x", "w1", "c1"], ["z"], name="fc1"),
        node("Relu", ["z"], ["h"], name="act"),
        node("Gemm", ["h", "w2"], ["y"], name="fc2"),
    ]
    return built(nodes, ["N", INPUTS], {n: a.astype(np.float32) for n, a in held.items()})


def uneven() -> Model:
    """The same MLP with hidden channels of very different and stable sizes."""
    model, spread = rare(), np.exp(np.random.default_rng(1).standard_normal(HIDDEN) * 1.5).astype(np.float32)
    held = constants_of(model)
    nodes = list(model.to_proto().graph.node)
    return built(nodes, ["N", INPUTS], {"w1": held["w1"] * spread, "c1": 2 * spread, "w2": held["w2"] / np.sqrt(spread)[:, None]})


def arrays(samples: int, seed: int) -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(seed).standard_normal((samples, INPUTS)).astype(np.float32)}


def hidden(model: Model, samples: int, seed: int = 0) -> tuple[MinMaxStat, RowsStat, NDArray[np.float64]]:
    """What the pass measures in front of fc2, and fc2's weight."""
    held, x = constants_of(model), arrays(samples, seed)["x"]
    h = np.maximum(x @ held["w1"] + held["c1"], 0)
    return MinMax(-1).observe(h), Rows(512).observe(h), held["w2"].astype(np.float64)


def found(parts: list[Half], weight: NDArray[np.float64]) -> tuple[float, float]:
    none = np.zeros(len(weight))
    return best_alpha(parts, weight, lambda e, a: (none, ratios(e, none, largest_of_rows(weight), a)), TYPES, None)


def quality(passes: str, model: Model, calibrated: int) -> tuple[float, list[Remark]]:
    """SQNR in dB on new samples."""
    ctx, new = context("trt", quantize=("fc2",)), arrays(400, 99)
    ctx.target = replace(ctx.target, half_body=False)
    made, reports = pipeline(passes, model, arrays(calibrated, 0), ctx)
    return sqnr_db(outputs(model, new)[0], outputs(made, new)[0]), [
        r for x in reports for r in x.remarks if r.pass_name == "smooth"
    ]


def test_a_search_on_the_fitted_rows_overfits_and_halves_do_not() -> None:
    stat, rows, weight = hidden(rare(), FEW)
    alpha, gain = found([Half(rows.rows, rows, stat)], weight)
    assert alpha > 0 and gain > 1.0, "on the rows that made the ratios, smoothing looks good"
    plain = quality("", rare(), FEW)[0]
    assert quality(f"smooth{{alpha={alpha}}}", rare(), FEW)[0] < plain - 1.0, "dB: on new rows it is not"
    kept, (remark,) = quality("smooth{search}", rare(), FEW)
    assert kept == plain and remark.kind == "missed" and remark.node == "fc2" and "held-out" in remark.reason


@pytest.mark.parametrize("samples", [32, 256])
def test_channels_that_stay_uneven_are_smoothed(samples: int) -> None:
    smoothed, (remark,) = quality("smooth{search}", uneven(), samples)
    assert remark.kind == "applied" and float(remark.numbers["alpha"]) > 0
    assert smoothed > quality("", uneven(), samples)[0] + 3.0


def test_halves_know_nothing_of_the_rows_they_judge() -> None:
    stat, rows, _ = hidden(rare(), 64)
    first, second = halves(stat, rows)
    assert len(first.judged) + len(second.judged) == 64
    for part, other in ((first, second), (second, first)):
        assert np.array_equal(part.extremes.hi, part.fitted.rows.max(0)) and np.array_equal(
            part.extremes.lo, part.fitted.rows.min(0)
        )
        assert set(map(bytes, part.fitted.rows)) == set(map(bytes, other.judged))


def test_extremes_of_rows_that_were_not_sampled_stand() -> None:
    stat, rows, _ = hidden(rare(), 64)
    wide = MinMaxStat(stat.lo - 1, stat.hi + 1)
    assert all(np.array_equal(part.extremes.hi, wide.hi) for part in halves(wide, rows))


def test_samples_are_never_torn_apart() -> None:
    tokens = np.random.default_rng(0).standard_normal((6, 10, 4)).astype(np.float32)
    parts = halves(MinMax(-1).observe(tokens), Rows(512).observe(tokens))
    of = [{int(np.argmax((tokens == r).all(-1).any(-1))) for r in p.judged} for p in parts]
    assert of[0] | of[1] == set(range(6)) and not of[0] & of[1]


@pytest.mark.parametrize("samples", [0, 1])
def test_nothing_to_judge_by_is_no_gain(samples: int) -> None:
    row = np.zeros((samples, 4), np.float32)
    stat = MinMax(-1).observe(np.ones((1, 4), np.float32))
    assert found(halves(stat, Rows(8).observe(row)), np.ones((4, 2))) == (0.0, 0.0)


def test_one_sample_is_split_by_rows() -> None:
    one = np.random.default_rng(0).standard_normal((1, 9, 4)).astype(np.float32)
    assert sorted(len(p.judged) for p in halves(MinMax(-1).observe(one), Rows(512).observe(one))) == [4, 5]


def test_extremes_without_the_judged_rows_are_estimated_where_not_all_rows_were_sampled() -> None:
    x = np.random.default_rng(0).standard_exponential((4000, 400)).astype(np.float32)
    rows = Rows(512).observe(x)
    part = halves(MinMax(-1).observe(x), rows)[0]
    judged = set(map(bytes, part.judged))
    without = x[[bytes(r) not in judged for r in x]].max(0)
    attained = without < x.max(0)
    assert 10 < attained.sum() < 60 and np.array_equal(part.extremes.hi[~attained], without[~attained])
    bias = np.mean(part.extremes.hi[attained] - without[attained])
    naive = np.mean(part.fitted.rows.max(0)[attained] - without[attained])
    assert abs(bias) < 0.3 * abs(naive)
