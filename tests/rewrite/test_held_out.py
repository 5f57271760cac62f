"""Rows that judge folds that were not fitted to them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from qcompile.calib.observe import MinMax, MinMaxStat, Rows, RowsStat
from qcompile.quant.qtype import INT8
from qcompile.quant.spec import QuantSpec
from qcompile.rewrite.held_out import Judge, Types, halves

TYPES = Types(QuantSpec(INT8), INT8)


def seen(samples: int, channels: int = 96) -> tuple[MinMaxStat, RowsStat]:
    """One row a sample; channels of unlike tails."""
    x = np.random.default_rng(0).standard_exponential((samples, channels)).astype(np.float32)
    return MinMax(-1).observe(x), Rows(512).observe(x)


def test_halves_know_nothing_of_the_rows_they_judge() -> None:
    stat, rows = seen(64)
    first, second = halves(stat, rows)
    assert len(first.judged) + len(second.judged) == 64
    for part, other in ((first, second), (second, first)):
        assert np.array_equal(part.extremes.hi, part.fitted.rows.max(0)) and np.array_equal(
            part.extremes.lo, part.fitted.rows.min(0)
        )
        assert set(map(bytes, part.fitted.rows)) == set(map(bytes, other.judged))


def test_extremes_of_rows_that_were_not_sampled_stand() -> None:
    stat, rows = seen(64)
    wide = MinMaxStat(stat.lo - 1, stat.hi + 1)
    assert all(np.array_equal(part.extremes.hi, wide.hi) for part in halves(wide, rows))


def test_samples_are_never_torn_apart() -> None:
    tokens = np.random.default_rng(0).standard_normal((6, 10, 4)).astype(np.float32)
    parts = halves(MinMax(-1).observe(tokens), Rows(512).observe(tokens))
    of = [{int(np.argmax((tokens == r).all(-1).any(-1))) for r in p.judged} for p in parts]
    assert of[0] | of[1] == set(range(6)) and not of[0] & of[1]


def test_one_sample_is_split_by_rows() -> None:
    one = np.random.default_rng(0).standard_normal((1, 35, 4)).astype(np.float32)
    assert sorted(len(p.judged) for p in halves(MinMax(-1).observe(one), Rows(512).observe(one))) == [17, 18]


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


def test_the_gain_is_over_no_fold_and_nothing_fits_to_the_judged_rows() -> None:
    stat, rows = seen(64)
    weight = np.random.default_rng(1).standard_normal((96, 8))
    judge = Judge(halves(stat, rows), weight, TYPES)
    asked: list[int] = []

    def none(half: object) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        asked.append(id(half))
        return np.zeros(96), np.ones(96)

    assert judge.gain_db(none) == 0.0 and len(set(asked)) == 2
    spread = np.linspace(0.1, 10, 96)
    assert judge.gain_db(lambda _: (np.zeros(96), spread)) < -1.0, "channels made uneven"


@pytest.mark.parametrize("samples", [0, 1, 31])
def test_few_rows_judge_nothing(samples: int) -> None:
    rows = Rows(512).observe(np.zeros((samples, 4), np.float32))
    assert halves(MinMax(-1).observe(np.ones((1, 4), np.float32)), rows) == []
