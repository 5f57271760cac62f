from __future__ import annotations

from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from qcompile.calib.observe import (
    CHUNK,
    AbsMax,
    ChannelHistograms,
    Extremes,
    Histogram,
    MinMax,
    Moments,
    NotCarried,
    Observer,
    Rows,
    SecondMoment,
)

EXACT = [
    MinMax(), MinMax(-1), MinMax(1), MinMax(-1, heads=2), AbsMax(), AbsMax(-1), AbsMax(-1, heads=2), Histogram(64), Histogram(),
    ChannelHistograms(), ChannelHistograms(1, 16), ChannelHistograms(-1, 64, heads=2), Rows(5), Rows(1000, seed=3),
    Extremes(1), Extremes(6), Extremes(1000),
]  # fmt: skip
SUMS = [Moments(), Moments(-1), Moments(1), Moments(-1, heads=2), SecondMoment(), SecondMoment("mask")]

values = st.one_of(st.floats(-1e4, 1e4, width=32), st.floats(-1, 1, width=32), st.just(0.0))
arrays = hnp.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 3), st.just(4)), elements=values)
triples = st.integers(1, 3).flatmap(  # three batches of one tensor: axis 1 may be the channels
    lambda tokens: st.tuples(
        *[hnp.arrays(np.float32, st.tuples(st.integers(1, 9), st.just(tokens), st.just(4)), elements=values)] * 3
    )
)


def same(a: Any, b: Any, rtol: float = 0) -> None:
    left, right = a.to_arrays(), b.to_arrays()
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_allclose(array, right[name], rtol=rtol, atol=rtol, err_msg=name)


def observe_parts(observer: Any, x: NDArray[Any], cuts: list[int]) -> list[Any]:
    ends = sorted({min(c, len(x)) for c in cuts} | {0, len(x)})
    return [observe(observer, x[a:b], a) for a, b in pairwise(ends)]


def observe(observer: Any, x: NDArray[Any], first: int = 0) -> Any:
    """With a token mask that depends on the values where the observer reads one."""
    if not isinstance(observer, SecondMoment) or observer.weights is None:
        return observer.observe(x, first)
    return observer.observe(x, first, None, (x[..., 0] >= 0).astype(np.float32))


@settings(max_examples=60, deadline=None)
@given(x=arrays, cuts=st.lists(st.integers(0, 9), max_size=5), order=st.randoms())
@pytest.mark.parametrize("observer", [*EXACT, *SUMS], ids=str)
def test_any_partition_in_any_order_gives_the_whole(observer: Any, x: NDArray[Any], cuts: list[int], order: Any) -> None:
    parts = [*observe_parts(observer, x, cuts), observer.empty()]
    order.shuffle(parts)
    merged = reduce(lambda a, b: a.merge(b), parts)
    same(merged, observe(observer, x), rtol=0 if observer in EXACT else 1e-9)


@settings(max_examples=40, deadline=None)
@given(batches=triples)
@pytest.mark.parametrize("observer", [*EXACT, *SUMS], ids=str)
def test_associative_commutative_neutral(observer: Any, batches: tuple[NDArray[Any], ...]) -> None:
    """Sums: of different chunks, bit for bit; what one chunk gets is added in order (see test_chunks.py)."""
    step = 10 if observer in EXACT else CHUNK
    a, b, c = (observe(observer, x, step * i) for i, x in enumerate(batches))
    same(a.merge(b).merge(c), a.merge(b.merge(c)))
    same(a.merge(b), b.merge(a))
    same(a.merge(observer.empty()), a)
    same(observer.empty().merge(a), a)


@settings(max_examples=20, deadline=None)
@given(x=arrays, cut=st.integers(0, 9))
@pytest.mark.parametrize("observer", [*EXACT, *SUMS], ids=str)
def test_a_statistic_from_a_file_goes_on_with_the_same_bits(observer: Any, x: NDArray[Any], cut: int) -> None:
    head, tail = observe(observer, x[:cut]) if cut else observer.empty(), x[cut:]
    rest = observe(observer, tail, cut) if len(tail) else observer.empty()
    same(observer.read(head.to_arrays()).merge(rest), head.merge(rest))


def test_every_kind_has_laws() -> None:
    assert {type(o) for o in (*EXACT, *SUMS)} == set(Observer.kinds.values())


@settings(deadline=None)
@given(x=hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_histogram_counts_are_exact(x: NDArray[Any]) -> None:
    hist = Histogram(32).observe(x)
    assert hist.total == x.size
    assert len(hist.counts) <= 32
    assert (hist.lo, hist.hi) == (x.min(), x.max())
    if np.isfinite(hist.edges).all():
        np.testing.assert_array_equal(np.histogram(x.astype(np.float64), np.append(hist.edges[:-1], np.inf))[0], hist.counts)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int64, np.uint8])
def test_histogram_of_other_dtypes(dtype: Any) -> None:
    x = np.arange(100).astype(dtype)
    same(Histogram(16).observe(x), Histogram(16).observe(x.astype(np.float32)))


def test_histogram_uses_at_least_half_its_bins() -> None:
    x = np.random.default_rng(0).normal(size=10000).astype(np.float32)
    assert 2000 < len(Histogram().observe(x).counts) <= 4096


@given(
    x=hnp.arrays(np.float64, (5, 3), elements=st.floats(-100, 100)),
    t=hnp.arrays(np.float64, 3, elements=st.floats(-10, 10)),
    r=hnp.arrays(np.float64, 3, elements=st.floats(0.1, 10) | st.floats(-10, -0.1)),
)
def test_minmax_follows_a_map_exactly(x: NDArray[Any], t: NDArray[Any], r: NDArray[Any]) -> None:
    same(MinMax(-1).observe(x).mapped(t, r), MinMax(-1).observe((x - t) / r))


def test_what_cannot_follow_a_map() -> None:
    x = np.ones((2, 3), np.float32)
    same(MinMax().observe(x).mapped(1.0, -2.0), MinMax().observe((x - 1) / -2))
    with pytest.raises(NotCarried, match="per-tensor"):
        MinMax().observe(x).mapped(np.zeros(3), np.ones(3))
    for observer in (AbsMax(), Histogram(), SecondMoment()):
        with pytest.raises(NotCarried):
            observer.observe(x).mapped(0.0, 2.0)


def test_channel_axes() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    assert MinMax(1).observe(x).lo.shape == (3,)
    np.testing.assert_array_equal(AbsMax(1).observe(x).amax, np.abs(x).max((0, 2, 3)))
    with pytest.raises(ValueError, match="axis 4 does not exist"):
        MinMax(4).observe(x)


def test_moments_and_second_moment_values() -> None:
    x = np.random.default_rng(0).normal(2, 3, size=(8, 5, 4)).astype(np.float32)
    stat = Moments(-1).observe(x)
    assert stat.count == 40
    np.testing.assert_allclose(stat.mean, x.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(stat.var, x.var((0, 1)), rtol=1e-5)
    flat = x.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(SecondMoment().observe(x).xtx, flat.T @ flat)


def test_rows_are_rows_of_the_data_and_spread() -> None:
    x = np.arange(100 * 7 * 2, dtype=np.float32).reshape(100, 7, 2)
    stat = Rows(64).observe(x, first_sample_index=1000)
    assert len(stat.rows) == 64
    np.testing.assert_array_equal(x[stat.ids[:, 0] - 1000, stat.ids[:, 1]], stat.rows)
    assert len(np.unique(stat.ids[:, 0])) > 30
    assert not np.array_equal(stat.ids, Rows(64, seed=1).observe(x, 1000).ids)


def test_rows_of_windows_keep_their_sample() -> None:
    x = np.arange(6 * 4 * 2, dtype=np.float32).reshape(6, 4, 2)
    whole = Rows(9).observe(x, 0, samples=3)
    parts = Rows(9).observe(x[4:], 2, samples=1).merge(Rows(9).observe(x[:4], 0, samples=2))
    same(whole, parts)


def test_observers_are_hashable_values() -> None:
    assert len({MinMax(1), MinMax(1), MinMax(), AbsMax(1), Histogram(), Histogram(4096)}) == 4
