"""Merge statistics of disjoint samples: any split, any order, the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qcompile.calib.observe import Probe, Stat
from qcompile.calib.store.store import Gathered, Range, Statistics, joined
from qcompile.errors import DataError


def merge(parts: Sequence[tuple[str, Statistics]]) -> Statistics:
    """All parts, each with the name to complain under, as one.

    Raises:
        DataError: keys, graphs or probes differ, or two parts hold the same samples.
    """
    name, merged = parts[0]
    for other, part in parts[1:]:
        if differing := merged.key.differences(part.key):
            raise DataError(
                f"{other} does not belong to {name}: they differ in {'; '.join(differing)};"
                " merge files of one model, one data set and one version"
            )
        for sweep in part.sweeps:
            mine = merged.sweep_of(sweep.graph)
            merged = merged.with_sweep(sweep if mine is None else _joined(mine, sweep, name, other))
        merged = replace(merged, feeds=merged.feeds or part.feeds)
    return merged


def _joined(a: Gathered, b: Gathered, name: str, other: str) -> Gathered:
    if a.stats.keys() != b.stats.keys():
        odd = a.stats.keys() ^ b.stats.keys()
        raise DataError(
            f"{other} does not belong to {name}: {len(odd)} probes are only in one of them (tensor {next(iter(odd)).tensor!r});"
            " calibrate all shards with the same options"
        )
    if both := _overlap(a.ranges, b.ranges):
        raise DataError(f"{name} and {other} both hold {words(both)}; leave one of them out")
    first, second = (a, b) if a.ranges <= b.ranges else (b, a)
    stats: dict[Probe, Stat] = {p: s.merge(second.stats[p]) for p, s in first.stats.items()}
    return Gathered(a.graph, tuple(joined([*a.ranges, *b.ranges])), stats)


def words(ranges: Sequence[Range]) -> str:
    """`samples 0-63, 128-191`."""
    return "samples " + ", ".join(f"{low}-{high - 1}" for low, high in ranges)


def _overlap(a: Sequence[Range], b: Sequence[Range]) -> list[Range]:
    both = ((max(x[0], y[0]), min(x[1], y[1])) for x in a for y in b)
    return sorted((low, high) for low, high in both if low < high)
