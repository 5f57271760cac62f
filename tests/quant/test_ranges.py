from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from qcompile.calib.observe import AbsMax, ChannelHistograms, Histogram, MinMax
from qcompile.quant.affine import fake_quant, qparams_from_range
from qcompile.quant.entropy import entropy
from qcompile.quant.qtype import FLOAT8E4M3FN, INT8, UINT8, QType, simulated_int
from qcompile.quant.ranges import (
    histogram_error,
    minmax,
    mse,
    output_error,
    percentile,
    weight_mse_scale,
    weighted,
    weighted_values,
)
from qcompile.quant.spec import PerAxis, PerBlock, PerTensor, QParams

INT4 = simulated_int(4)


def error(x: NDArray[Any], lo: Any, hi: Any, qtype: QType, symmetric: bool) -> float:
    return float(np.square(fake_quant(x, qparams_from_range(lo, hi, qtype, symmetric), qtype) - x).sum())


def heavy(n: int = 20000, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_t(3, n).astype(np.float32)


def test_minmax_of_any_statistic() -> None:
    x = np.array([-3.0, 1.0, 2.0], np.float32)
    assert minmax(MinMax().observe(x)) == (-3, 2)
    assert minmax(AbsMax().observe(x)) == (-3, 3)
    assert minmax(Histogram().observe(x)) == (-3, 2)


@settings(deadline=None)
@given(x=hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-100, 100, width=32)), p=st.floats(60, 100))
def test_percentile_cuts_the_share_within_a_bin(x: NDArray[Any], p: float) -> None:
    hist = Histogram(256).observe(x)
    width = float(hist.edges[1] - hist.edges[0])
    lo, hi = percentile(hist, p)
    assert x.min() <= lo <= hi + width
    assert hi <= x.max()
    assert np.mean(x > hi + width) <= (1 - p / 100) + 1e-9
    assert np.mean(x < lo - width) <= (1 - p / 100) + 1e-9
    _, top = percentile(hist, p, symmetric=True)
    assert np.mean(np.abs(x) > top + width) <= (1 - p / 100) + 1e-9


def test_percentile_agrees_with_numpy_on_many_values() -> None:
    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    hist = Histogram().observe(x)
    lo, hi = percentile(hist, 99.9)
    np.testing.assert_allclose([lo, hi], np.percentile(x, [0.1, 99.9]), atol=0.02)
    np.testing.assert_allclose(percentile(hist, 99.9, symmetric=True)[1], np.percentile(np.abs(x), 99.9), atol=0.02)


def test_percentile_100_is_minmax() -> None:
    hist = Histogram().observe(heavy())
    assert percentile(hist, 100) == minmax(hist)
    assert percentile(hist, 100, symmetric=True)[1] == max(-hist.lo, hist.hi)


def test_percentile_of_one_sided_data_stays_one_sided() -> None:
    lo, hi = percentile(Histogram().observe(np.abs(heavy())), 99)
    assert 0 <= lo < hi


def test_percentile_is_checked() -> None:
    with pytest.raises(ValueError, match=r"\(50, 100\], got 1"):
        percentile(Histogram().observe(heavy()), 1)
    with pytest.raises(ValueError, match="empty"):
        percentile(Histogram().empty(), 99)


@pytest.mark.parametrize(("qtype", "symmetric"), [(INT8, True), (INT4, True), (UINT8, False), (INT4, False)])
def test_mse_is_near_the_best_of_a_dense_search(qtype: QType, symmetric: bool) -> None:
    x = heavy() + (0 if symmetric else 1.5)
    x = x.astype(np.float32)
    lo, hi = mse(Histogram().observe(x), qtype, symmetric)
    found = error(x, lo, hi, qtype, symmetric)
    ratios = np.linspace(0.02, 1, 60)
    if symmetric:
        dense = min(error(x, -t, t, qtype, True) for t in np.abs(x).max() * ratios)
    else:
        dense = min(error(x, x.min() * a, x.max() * b, qtype, False) for a in ratios[::3] for b in ratios[::3])
    assert found <= 1.05 * dense
    assert found <= error(x, x.min(), x.max(), qtype, symmetric)


def test_mse_of_trivial_data() -> None:
    lo, hi = mse(Histogram().observe(np.zeros(10, np.float32)), INT8)
    assert (lo, hi) == (0, 0)
    lo, hi = mse(Histogram().observe(np.full(10, 3.0, np.float32)), UINT8, symmetric=False)
    assert lo == 0
    assert hi == pytest.approx(3, rel=0.1)


@settings(deadline=None, max_examples=40)
@given(w=hnp.arrays(np.float32, (5, 12), elements=st.floats(-10, 10, width=32)), axis=st.sampled_from([0, 1, -1]))
@pytest.mark.parametrize("qtype", [INT8, INT4], ids=lambda q: q.name)
def test_weight_search_never_loses_to_minmax(qtype: QType, w: NDArray[Any], axis: int) -> None:
    channels = PerAxis(axis % 2)
    stat = MinMax(axis).observe(w)
    best = QParams(weight_mse_scale(w, qtype, axis), np.zeros(w.shape[axis], np.int64))
    plain = qparams_from_range(stat.lo, stat.hi, qtype)
    ours, theirs = (np.square(fake_quant(w, q, qtype, channels) - w).sum(1 - axis % 2) for q in (best, plain))
    assert (ours <= theirs * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1), PerBlock(0, 8), PerBlock(1, 5)], ids=str)
def test_weight_search_by_granularity(granularity: Any) -> None:
    w = heavy(16 * 12).reshape(16, 12)
    scale = weight_mse_scale(w, INT4, granularity)
    q = QParams(scale, np.zeros(scale.shape, np.int64))
    assert np.square(fake_quant(w, q, INT4, granularity) - w).sum() < np.square(w).sum()


def test_importance_moves_the_scale() -> None:
    w = heavy(64 * 8).reshape(64, 8)
    w[0] = 30
    importance = np.ones((64, 1))
    importance[0] = 1e4
    plain, weighted = weight_mse_scale(w, INT4, 1), weight_mse_scale(w, INT4, 1, importance)
    assert (weighted > plain).all()


def test_weight_search_is_fast() -> None:
    w = heavy(1000 * 4096).reshape(1000, 4096)
    start = time.perf_counter()
    weight_mse_scale(w, INT8, 0)
    assert time.perf_counter() - start < 5


def kl_by_the_book(counts: NDArray[Any], levels: int) -> NDArray[Any]:
    """KL(P || Q) of every threshold, bin by bin (Migacz 2017)."""
    found: list[float] = []
    for i in range(levels, len(counts) + 1):
        p = counts[:i].astype(np.float64)
        p[-1] += counts[i:].sum()
        q = np.zeros(i)
        for a, b in itertools.pairwise(k * i // levels for k in range(levels + 1)):
            filled = counts[a:b] > 0
            q[a:b][filled] = counts[a:b].sum() / max(1, filled.sum())
        q[(q == 0) & (p > 0)] = 1e-4
        p, q, some = p / p.sum(), q / counts[:i].sum(), p > 0
        found.append(float((p[some] * np.log(p[some] / q[some])).sum()))
    return np.array(found)


@pytest.mark.parametrize("bits", [4, 8])
def test_entropy_is_the_book_s(bits: int) -> None:
    x = heavy()
    hist = Histogram(512).observe(x)
    width = float(hist.edges[1] - hist.edges[0])
    counts = np.bincount(np.floor(np.abs(x) / np.float32(width)).astype(int))
    counts[0] = counts[1]
    levels = 2 ** (bits - 1)
    best = levels + int(np.argmin(kl_by_the_book(counts, levels)))
    lo, hi = entropy(hist, simulated_int(bits))
    assert hi == -lo == pytest.approx(min(best * width, float(np.abs(x).max())), abs=width)


@pytest.mark.parametrize("symmetric", [True, False])
def test_entropy_cuts_outliers_and_leaves_flat_data(symmetric: bool) -> None:
    qtype = INT8 if symmetric else UINT8
    rng = np.random.default_rng(0)
    normal = rng.normal(size=100_000).astype(np.float32)
    lo, hi = entropy(Histogram().observe(np.append(normal, np.float32(60))), qtype, symmetric)
    assert 3 < hi < 30 and lo >= (-hi if symmetric else float(normal.min()))
    flat = rng.uniform(-1, 1, 100_000).astype(np.float32)
    assert entropy(Histogram().observe(flat), qtype, symmetric)[1] > 0.95
    relu = np.maximum(normal, 0)
    assert entropy(Histogram().observe(relu), qtype, symmetric)[1] > 3, "zeros must not outweigh all other values"


def test_entropy_is_near_onnxruntime_s() -> None:
    from onnxruntime.quantization.calibrate import HistogramCollector

    x = np.random.default_rng(0).laplace(size=50_000).astype(np.float32)
    top = float(np.abs(x).max())
    counts, edges = np.histogram(x, 1023, range=(-top, top))
    collector = HistogramCollector.__new__(HistogramCollector)
    theirs = float(collector.get_entropy_threshold((counts, edges, x.min(), x.max(), top), 255)[1])
    ours = float(entropy(Histogram(1024).observe(x), INT8)[1])
    assert 0.6 < ours / theirs < 1.67, "both cut the tail of a Laplace distribution (their merging of bins differs in the rest)"
    assert ours < top


def test_entropy_refuses_what_it_is_not_defined_for() -> None:
    with pytest.raises(ValueError, match="its levels are not equal"):
        entropy(Histogram().observe(heavy()), FLOAT8E4M3FN)
    with pytest.raises(ValueError, match="empty"):
        entropy(Histogram().empty(), INT8)
    few = Histogram(64).observe(heavy())
    assert entropy(few, INT8)[1] == max(-few.lo, few.hi)


def channels(seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Rows whose widest channel hardly matters to the next layer."""
    x = np.random.default_rng(seed).normal(size=(4000, 6)).astype(np.float32)
    x[:, 0] *= 40
    w = np.random.default_rng(1).normal(size=(6, 5))
    w[0] *= 1e-4
    return x, w


@pytest.mark.parametrize("source", ["histograms", "values"])
def test_weights_decide_which_channels_count(source: str) -> None:
    x, w = channels()
    importance = np.square(w).sum(1)
    hists = ChannelHistograms(bins=8192).observe(x).channels
    hist = weighted(hists, importance) if source == "histograms" else weighted_values(x, importance, 8192)
    plain, by_weight = mse(Histogram().observe(x), INT4), mse(hist, INT4)
    assert by_weight[1] < 0.5 * plain[1]
    assert output_error(x, w, *by_weight, INT4) < 0.5 * output_error(x, w, *plain, INT4)
    dense = min(output_error(x, w, -t, t, INT4) for t in np.geomspace(0.5, 160, 80))
    assert output_error(x, w, *by_weight, INT4) <= 1.1 * dense


def test_equal_weights_change_nothing() -> None:
    x, _ = channels()
    hists = ChannelHistograms().observe(x).channels
    both = weighted(hists, np.ones(6))
    whole = Histogram().observe(x)
    assert both.counts.sum() == whole.total and (both.lo, both.hi) == (whole.lo, whole.hi)
    np.testing.assert_allclose(mse(both, INT8)[1], mse(whole, INT8)[1], rtol=0.05)
    with pytest.raises(ValueError, match="6 channels need as many importances"):
        weighted(hists, np.ones(5))
    with pytest.raises(ValueError, match="nothing was observed"):
        weighted([Histogram().empty()], np.ones(1))


def test_the_error_of_a_range_on_a_histogram() -> None:
    x = heavy()
    hist = Histogram().observe(x)
    for t in (1.0, 5.0, 20.0):
        assert histogram_error(hist, -t, t, INT8) == pytest.approx(error(x, -t, t, INT8, True), rel=0.05)


def test_no_codes_are_spent_where_nothing_is_seen() -> None:
    x = np.random.default_rng(0).normal(-2, 4, 50000).astype(np.float32)

    def seen(v: NDArray[np.float64]) -> NDArray[np.float64]:
        return v * np.clip(v / 6 + 0.5, 0, 1)

    hist = Histogram().observe(x)
    plain, behind = (mse(hist, UINT8, symmetric=False, seen=f) for f in (None, seen))
    assert -3.2 < float(behind[0]) < -2.5 and float(plain[0]) < -10
    errors = [
        float(np.square(seen(fake_quant(x, qparams_from_range(lo, hi, UINT8, False), UINT8)) - seen(x)).sum())
        for lo, hi in (plain, behind)
    ]
    assert errors[1] < errors[0] / 1.5
