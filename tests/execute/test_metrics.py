from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.execute import metrics
from qcompile.execute.metrics import MAX_SQNR_DB, ChannelTally, Distance, LogitTally

RNG = np.random.default_rng(0)


def test_sqnr_is_ten_log_of_the_power_ratio() -> None:
    x = np.ones((2, 3, 4))
    assert metrics.sqnr_db(x, x + 0.01) == pytest.approx(40.0)


def test_sqnr_of_equal_arrays_is_finite_and_of_a_zero_reference_the_least() -> None:
    assert metrics.sqnr_db([1.0], [1.0]) == MAX_SQNR_DB
    assert metrics.sqnr_db([0.0], [1.0]) == -MAX_SQNR_DB


def test_cosine_and_relative_error() -> None:
    assert metrics.cosine([1.0, 0.0], [1.0, 1.0]) == pytest.approx(2**-0.5)
    assert metrics.cosine([0.0], [0.0]) == 1.0
    assert metrics.cosine([0.0], [2.0]) == 0.0
    assert metrics.relative_error([2.0, -4.0], [2.0, -3.0]) == pytest.approx(0.25)
    assert metrics.relative_error([0.0], [3.0]) == 3.0


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        metrics.sqnr_db(np.zeros((2, 3)), np.zeros((3, 2)))


def test_kl_against_the_formula_and_of_large_logits() -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.25, 0.25])
    expected = float((p * np.log(p / q)).sum())
    assert metrics.kl(np.log(p)[None] + 900, np.log(q)[None] - 900) == pytest.approx(expected)
    assert metrics.kl(p[None], q[None]) == pytest.approx(expected), "rows that are probabilities are used as they are"


def test_agreement_of_token_logits() -> None:
    a = np.zeros((2, 2, 3))
    a[..., 1] = 50.0
    b = a.copy()
    b[0, 0] = [90.0, 0.0, 0.0]
    assert metrics.agreement(a, b) == 0.75


@given(st.integers(1, 19))
def test_tallies_do_not_depend_on_the_batches(cut: int) -> None:
    r = RNG.standard_normal((20, 6))
    c = r + 0.1 * RNG.standard_normal(r.shape)
    distance, logits = Distance(), LogitTally()
    for part in (slice(0, cut), slice(cut, None)):
        distance.add(r[part], c[part])
        logits.add(r[part], c[part])
    assert distance.sqnr_db == pytest.approx(metrics.sqnr_db(r, c))
    assert distance.cosine == pytest.approx(metrics.cosine(r, c))
    assert (logits.kl, logits.agreement) == pytest.approx((metrics.kl(r, c), metrics.agreement(r, c)))


@pytest.mark.parametrize("shape", [(10, 7, 6), (10, 6, 5, 5)])
def test_channel_fit_undoes_a_folded_map(shape: tuple[int, ...]) -> None:
    r = RNG.standard_normal(shape)
    scale = np.linspace(0.2, 4.0, 6).reshape((6, 1, 1) if len(shape) == 4 else (6,))
    tally = ChannelTally()
    for half in np.array_split(r, 2):
        tally.add(half, half * scale + 3.0 + 1e-3 * RNG.standard_normal(half.shape) * scale)
    sqnr, slope = tally.fit()
    assert sqnr == pytest.approx(60.0, abs=1.0)
    assert slope > 0.5
    assert metrics.sqnr_db(r, r * scale + 3.0) < 0


def test_channel_fit_of_constants_and_vectors() -> None:
    tally = ChannelTally()
    tally.add(np.zeros(4), np.zeros(4))
    assert tally.fit() == (MAX_SQNR_DB, 0.0)
    assert ChannelTally().fit() == (MAX_SQNR_DB, 0.0)


def test_channels_that_are_lost_are_no_rescaling() -> None:
    tally, x = ChannelTally(), np.random.default_rng(0).standard_normal((50, 4))
    tally.add(x, np.zeros_like(x))
    assert tally.fit()[0] == pytest.approx(0.0)
