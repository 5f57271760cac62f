"""On a GPU: the same statistics as on the CPU, within float tolerance.  Skipped without one."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.calib.observe import ChannelHistograms, Histogram, HistogramStat, Observer, Probe, RowsStat, Stat
from qcompile.calib.sweep.sweep import sweep
from qcompile.execute import session
from qcompile.execute.session import Providers, providers
from tests.calib.sweep.graphs import transformer
from tests.calib.sweep.test_reductions import held

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(providers().reason is not None, reason="no usable CUDA provider")]

TENSORS = ("h", "ln", "act", "res")
TOLERANCE = 1e-4
"""Relative to the largest value: float32 sums in another order, no TF32."""


def statistics(tensors: tuple[str, ...] = TENSORS) -> dict[Probe, Stat]:
    data = held({"ids": np.random.default_rng(0).integers(0, 50, (64, 5))})
    return sweep(transformer(), data, [Probe(t, observer()) for t in tensors for observer in Observer.kinds.values()], batch=8)


@pytest.mark.parametrize("tensor", TENSORS)
def test_the_device_gives_the_statistics_of_the_cpu(tensor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = statistics((tensor,))
    monkeypatch.setattr(session, "providers", lambda: Providers(("CPUExecutionProvider",), None))
    for probe, expected in statistics((tensor,)).items():
        if isinstance(probe.observer, Histogram):
            same_histogram(device[probe], expected)
        elif not isinstance(probe.observer, ChannelHistograms):
            same_arrays(device[probe], expected)


def same_arrays(found: Stat, expected: Stat) -> None:
    """Extremes and rows may choose another sample among equals: only values are compared."""
    skipped = {"ids", "keys"} if isinstance(expected, RowsStat) else {"ids"}
    there, wanted = found.to_arrays(), expected.to_arrays()
    for name in wanted.keys() - skipped:
        scale = float(np.abs(wanted[name]).max(initial=1.0))
        np.testing.assert_allclose(there[name], wanted[name], atol=TOLERANCE * scale, rtol=0, err_msg=name)


def same_histogram(found: Stat, expected: Stat) -> None:
    """Values near the edge of a bin change sides: the distributions are compared."""
    assert isinstance(found, HistogramStat) and isinstance(expected, HistogramStat)
    assert found.total == expected.total
    edges = np.union1d(found.edges, expected.edges)
    shares = [np.interp(edges, s.edges, np.concatenate([[0], np.cumsum(s.counts)])) / s.total for s in (found, expected)]
    assert np.abs(shares[0] - shares[1]).max() < 0.01
