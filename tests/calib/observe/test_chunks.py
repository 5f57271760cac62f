from __future__ import annotations

from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.calib.observe import ChannelHistograms, Extremes, MinMax, Moments, Observer, SecondMoment
from qcompile.calib.observe.chunks import CHUNK, ChunkedSum, by_chunk, chunk_samples
from qcompile.calib.observe.histogram import occurrences

OBSERVERS = [Moments(), Moments(-1), Moments(-1, heads=2), SecondMoment()]


def data(samples: int) -> Any:
    rng = np.random.default_rng(samples)
    return (rng.normal(size=(samples, 2, 4)) * rng.lognormal(0, 3, (samples, 1, 4))).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(chunks=st.integers(1, 6), rest=st.integers(0, CHUNK - 1), cuts=st.sets(st.integers(1, 6)), order=st.randoms())
@pytest.mark.parametrize("observer", OBSERVERS, ids=str)
def test_whole_chunks_in_any_order_give_the_same_bits(observer: Any, chunks: int, rest: int, cuts: set[int], order: Any) -> None:
    x = data(chunks * CHUNK + rest)
    ends = sorted({min(c * CHUNK, len(x)) for c in cuts} | {0, len(x)})
    parts = [observer.empty(), *(observer.observe(x[a:b], a) for a, b in pairwise(ends))]
    order.shuffle(parts)
    merged = reduce(lambda a, b: a.merge(b), parts)
    whole = observer.observe(x, 0)
    arrays = whole.to_arrays()
    assert all(np.array_equal(v, arrays[k]) for k, v in merged.to_arrays().items())
    folded = merged.folded(chunks)
    assert np.array_equal(folded.sums.total, whole.sums.total)
    assert len(folded.sums.parts) == (rest > 0)


def test_overlapping_prefixes_are_refused() -> None:
    stat = Moments().observe(data(CHUNK), 0).folded(1)
    with pytest.raises(ValueError, match="both statistics hold the first 64 samples"):
        stat.merge(stat)
    with pytest.raises(ValueError, match="do not overlap"):
        stat.merge(Moments().observe(data(3), 5))


@pytest.mark.parametrize(("first", "length", "samples"), [(0, 130, None), (60, 10, 10), (62, 12, 4), (3, 7, 2), (0, 0, 0)])
def test_by_chunk_covers_every_row_once(first: int, length: int, samples: int | None) -> None:
    pieces = list(by_chunk(np.zeros((length, 2)), first, samples))
    rows = [r for _, part in pieces for r in range(length)[part]]
    assert rows == list(range(length))
    assert pieces[0][0] == first // CHUNK


def test_chunks_of_fixed_batches_are_multiples() -> None:
    assert [chunk_samples(b) for b in (None, 1, 8, 3, 50, 64, 100)] == [64, 64, 64, 63, 50, 64, 100]


@pytest.mark.parametrize("observer", [*(o() for o in Observer.kinds.values()), Moments(-1), ChannelHistograms(-1, 16)], ids=str)
@pytest.mark.parametrize("samples", [0, 70])
def test_arrays_round_trip(observer: Any, samples: int) -> None:
    stat = observer.observe(data(samples)) if samples else observer.empty()
    again = observer.read(stat.to_arrays())
    for name, array in stat.to_arrays().items():
        np.testing.assert_array_equal(again.to_arrays()[name], array)
        assert again.to_arrays()[name].dtype == array.dtype
    assert type(again) is type(stat)


def test_an_empty_chunked_sum_is_neutral() -> None:
    x = ChunkedSum(parts={3: np.ones(2)})
    np.testing.assert_array_equal(x.merge(ChunkedSum()).total, ChunkedSum().merge(x).total)


def test_heads_are_groups_of_channels() -> None:
    x = data(9)
    np.testing.assert_array_equal(MinMax(-1, heads=2).observe(x).hi, x.reshape(9, 2, 2, 2).max((0, 1, 3)))
    assert Moments(-1, heads=2).observe(x).count == 9 * 2 * 2
    hist = ChannelHistograms(-1, 32, heads=2).observe(x)
    assert [c.total for c in hist.channels] == [36, 36]
    np.testing.assert_array_equal(hist.hi, x.reshape(9, 2, 2, 2).max((0, 1, 3)))
    with pytest.raises(ValueError, match="4 channels cannot be split into 3 heads"):
        MinMax(-1, heads=3).observe(x)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=4), order=st.randoms())
def test_extremes_are_exact(cuts: list[int], order: Any) -> None:
    x = np.round(data(40) * 2) / 2  # ties
    ends = sorted({*cuts, 0, 40})
    parts = [Extremes(5).observe(x[a:b], a) for a, b in pairwise(ends)]
    order.shuffle(parts)
    merged = reduce(lambda a, b: a.merge(b), parts)
    whole = Extremes(5).observe(x)
    np.testing.assert_array_equal(merged.ids, whole.ids)
    np.testing.assert_array_equal(whole.magnitudes, np.sort(np.abs(x).max(-1).reshape(-1))[::-1][:5])
    for size, (sample, row) in zip(whole.magnitudes, whole.ids, strict=True):
        assert np.abs(x[sample, row]).max() == size


def test_second_moment_with_weights() -> None:
    x, w = data(70).astype(np.float64), np.random.default_rng(0).integers(0, 3, (70, 2))
    stat = SecondMoment("w").observe(x, 0, None, w)
    assert stat.count == np.count_nonzero(w)
    rows = x.reshape(-1, 4)
    np.testing.assert_allclose(stat.xtx, rows.T @ (rows * w.reshape(-1, 1)), rtol=1e-12)
    with pytest.raises(ValueError, match="69 weights do not fit 140 rows"):
        SecondMoment("w").observe(x, 0, None, w.reshape(-1)[:69])


@settings(max_examples=30, deadline=None)
@given(codes=st.lists(st.integers(-300, 300), max_size=400))
def test_counting_equals_numpy(codes: list[int]) -> None:
    array = np.array(codes, np.int32)
    np.testing.assert_array_equal(occurrences(array + np.int32(300), 601), np.bincount(array + 300, minlength=601))
