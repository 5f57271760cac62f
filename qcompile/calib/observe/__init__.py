"""Observers: frozen descriptions of what to learn about a tensor; their results form a commutative monoid.

    observer.empty()                         the neutral element
    observer.observe(array, first, samples)  the statistic of one batch: the tested reference of every in-graph reduction
    stat.merge(other)                        associative and commutative, so batches, sweeps and machines may be split at will

MinMax, AbsMax, Histogram, Rows and Extremes give bit-identical results for every partition; Moments and SecondMoment
are float64 sums, bit-identical for every partition into whole chunks (`qcompile.calib.observe.chunks`) and equal up to rounding
(about 1e-15 relative) otherwise.  Channel axes: -1 for token tensors, 1 for NCHW.
"""

from __future__ import annotations

from qcompile.calib.observe.chunks import CHUNK
from qcompile.calib.observe.extrema import AbsMax, AbsMaxStat, MinMax, MinMaxStat
from qcompile.calib.observe.histogram import ChannelHistograms, ChannelHistogramsStat, Histogram, HistogramStat
from qcompile.calib.observe.observer import Observer, Probe, Reduction, Seen, Tally, Told
from qcompile.calib.observe.rows import Extremes, ExtremesStat, Rows, RowsStat
from qcompile.calib.observe.stat import NotCarried, Stat, other_axes
from qcompile.calib.observe.sums import Moments, MomentsStat, SecondMoment, SecondMomentStat

__all__ = [
    "CHUNK", "AbsMax", "AbsMaxStat", "ChannelHistograms", "ChannelHistogramsStat", "Extremes", "ExtremesStat",
    "Histogram", "HistogramStat", "MinMax", "MinMaxStat", "Moments", "MomentsStat", "NotCarried", "Observer", "Probe",
    "Reduction", "Rows", "RowsStat", "SecondMoment", "SecondMomentStat", "Seen", "Stat", "Tally", "Told", "other_axes",
]  # fmt: skip
