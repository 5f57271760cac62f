"""Checks of the data: samples and ranges that make a calibration worse than it looks, each warned with its numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.data.dataset import Dataset
from qcompile.calib.data.preprocess import Preprocess, bind, load_preprocess
from qcompile.calib.data.readers import stored_bytes
from qcompile.calib.observe import Extremes, ExtremesStat, MinMax, Probe, Stat, Told
from qcompile.errors import DataError
from qcompile.ir.model import InputInfo

SCANNED = 512
CLIPPED_SHARE = 0.1
CLIPPED_EXCESS = 3.0
LONE_RATIO = 2.0
EXTREME_ROWS = 64
_SHOWN = 5
_TOLERANCE = 1e-3


@dataclass
class _Input:
    """What is kept of one input: a few numbers a sample."""

    name: str
    floating: bool
    lows: list[float] = field(default_factory=list[float])
    highs: list[float] = field(default_factory=list[float])
    sizes: list[int] = field(default_factory=list[int])
    at_low: list[float] = field(default_factory=list[float])
    at_high: list[float] = field(default_factory=list[float])
    whole: bool = True

    def add(self, x: NDArray[Any]) -> None:
        if not x.size or x.dtype == object:
            return
        low, high = x.min(), x.max()
        self.lows.append(float(low))
        self.highs.append(float(high))
        self.sizes.append(x.size)
        self.at_low.append(float(np.mean(x == low)))
        self.at_high.append(float(np.mean(x == high)))
        self.whole = self.whole and bool((x == np.rint(x)).all())


def check_data(data: Dataset, inputs: Sequence[InputInfo], preprocess: str | None = None) -> list[str]:
    """Warnings about constant, repeated and clipped samples, inputs outside their declared normalisation, and inputs whose
    range one sample sets.  At most 512 samples, spread evenly, are looked at; NaN and infinity raise `DataError`."""
    shown = data.take(SCANNED)
    kept = [_Input(i.name, i.dtype.kind in "fV") for i in inputs]
    hashes: list[bytes] = []
    for feed in _samples(shown):
        hashes.append(_hash(feed))
        for one in kept:
            one.add(feed[one.name])
    index, found = shown.index, _repeated(hashes, shown.index)
    for one, info in zip(kept, inputs, strict=True):
        if len(one.lows) == len(index):
            found += _of_input(one, info, index, preprocess)
    return found


def shapes(data: Dataset) -> dict[str, dict[str, list[int]]]:
    """{input: {"min": dims, "max": dims}} over the samples, the sample axis being 1."""
    first = {data.reader.shape_key(i): i for i in reversed(data.index)}
    seen = [{n: a.shape for n, a in data.reader.read([i]).items()} for i in first.values()]
    names = seen[0] if seen else {}
    return {
        n: {"min": [min(d) for d in zip(*(s[n] for s in seen), strict=True)], "max": [max(d) for d in _axes(seen, n)]}
        for n in names
    }


def with_extremes(probes: Sequence[Probe]) -> list[Probe]:
    """`probes`, and for every range that a single value can set (min-max of a whole tensor) who sets it."""
    return list(dict.fromkeys([*probes, *(Probe(p.tensor, Extremes(EXTREME_ROWS)) for p in probes if p.observer == MinMax())]))


def check_ranges(stats: Mapping[Probe, Stat], index: Sequence[int] | None = None) -> list[str]:
    """Warnings about tensors whose largest value is `LONE_RATIO` times that of every other sample.

    `index` translates sample numbers into those of the stored data.
    """
    lone = [found for tensor, s in Told(stats).of(Extremes) if (found := _lone(tensor, s, index))]
    lone.sort(key=lambda f: -f[0])
    lines = [text for _, text in lone[:_SHOWN]]
    return lines if len(lone) <= _SHOWN else [*lines, f"... and {len(lone) - _SHOWN} more tensors whose range one sample sets"]


def _samples(data: Dataset) -> Iterator[dict[str, NDArray[Any]]]:
    for i in range(len(data)):
        yield from replace(data, index=data.index[i : i + 1]).batches(1)


def _hash(feed: Mapping[str, NDArray[Any]]) -> bytes:
    h = hashlib.blake2b(digest_size=16)
    for name, array in sorted(feed.items()):
        h.update(name.encode() + stored_bytes(array))
    return h.digest()


def _axes(seen: Sequence[Mapping[str, tuple[int, ...]]], name: str) -> Iterable[tuple[int, ...]]:
    return zip(*(s[name] for s in seen), strict=True)


def _repeated(hashes: Sequence[bytes], index: Sequence[int]) -> list[str]:
    first: dict[bytes, int] = {}
    again = [(i, first[h]) for i, h in zip(index, hashes, strict=True) if first.setdefault(h, i) != i]
    if not again:
        return []
    (late, early), n = again[0], len(again)
    return [f"{n} of {len(index)} samples repeat another (sample {late} is sample {early}): they add nothing; remove them"]


def _of_input(one: _Input, info: InputInfo, index: Sequence[int], preprocess: str | None) -> list[str]:
    if info.masks:
        return []
    found = _constant(one, index)
    if not one.floating:
        return found
    found += _clipped(one, index) + _set_by_one(one, index)
    declared = _declared(info, preprocess)
    return found + (_outside(one, declared, str(preprocess)) if declared is not None else _looks_raw(one, info))


def _constant(one: _Input, index: Sequence[int]) -> list[str]:
    """Samples of one value; an input where all are (a time step) is meant to be so, and a mask may be all ones."""
    usual = 1.0 if not one.floating and min(one.lows) >= 0 and max(one.highs) <= 1 else None
    spans = zip(one.lows, one.highs, one.sizes, strict=True)
    bad = [k for k, (low, high, size) in enumerate(spans) if low == high != usual and size > 1]
    if not bad or len(bad) == len(index):
        return []
    return [f"input {one.name!r}: {_many(bad, index)} constant (all {one.lows[bad[0]]:g}): blank or damaged? Remove them"]


def _clipped(one: _Input, index: Sequence[int]) -> list[str]:
    """Samples with far more values than usual exactly at the end of the input's range."""
    ends = ((one.lows, one.at_low, min(one.lows), "smallest"), (one.highs, one.at_high, max(one.highs), "largest"))
    found: list[str] = []
    for values, shares, end, word in ends:
        share = [s if v == end else 0.0 for v, s in zip(values, shares, strict=True)]
        usual = CLIPPED_EXCESS * float(np.median(share))
        bad = [k for k, s in enumerate(share) if s >= max(CLIPPED_SHARE, usual) and one.lows[k] < one.highs[k]]
        if bad and end != 0 and values.count(end) > 1:  # an end that one sample reaches alone is its own, not a limit
            worst = max(bad, key=lambda k: share[k])
            found.append(
                f"input {one.name!r}: {_many(bad, index)} clipped: up to {100 * share[worst]:.0f} % of the values (sample"
                f" {index[worst]}) are exactly the {word}, {end:g}; check how they were made"
            )
    return found


def _set_by_one(one: _Input, index: Sequence[int]) -> list[str]:
    sizes = [max(-low, high) for low, high in zip(one.lows, one.highs, strict=True)]
    order = np.argsort(sizes)[::-1]
    if len(sizes) < 2 or sizes[order[0]] < LONE_RATIO * sizes[order[1]]:
        return []
    top, next_ = order[0], order[1]
    return [
        f"input {one.name!r}: sample {index[top]} alone sets the range: it reaches {sizes[top]:g}, every other one at most"
        f" {sizes[next_]:g}; leave it out unless such inputs are real"
    ]


def _declared(info: InputInfo, preprocess: str | None) -> Preprocess | None:
    if preprocess is None or len(info.shape) != 4:
        return None
    try:
        return bind(load_preprocess(preprocess), info)
    except DataError:
        return None


def _outside(one: _Input, rule: Preprocess, spec: str) -> list[str]:
    """Values that no pixel 0..255 can have under the declared preprocessing."""
    ends = np.array([[(p * rule.scale - m) / s for p in (0, 255)] for m, s in _channels(rule)])
    low, high = float(ends.min()), float(ends.max())
    slack = _TOLERANCE * (high - low)
    if min(one.lows) >= low - slack and max(one.highs) <= high + slack:
        return []
    return [
        f"input {one.name!r} holds {min(one.lows):g} to {max(one.highs):g} and the declared preprocessing {spec} gives"
        f" {low:.4g} to {high:.4g}: was the data prepared in another way?"
    ]


def _channels(rule: Preprocess) -> list[tuple[float, float]]:
    count = max(len(rule.mean), len(rule.std))
    wide: Callable[[tuple[float, ...]], tuple[float, ...]] = lambda v: v if len(v) == count else v * count  # noqa: E731
    return list(zip(wide(rule.mean), wide(rule.std), strict=True))


def _looks_raw(one: _Input, info: InputInfo) -> list[str]:
    """Whole numbers up to 255 in a float picture input: normalisation was forgotten."""
    pictures = len(info.shape) == 4 and {1, 3} & {info.shape[1], info.shape[3]}
    if not pictures or not one.whole or min(one.lows) < 0 or not 100 <= max(one.highs) <= 255:
        return []
    span = f"{min(one.lows):g} to {max(one.highs):g}"
    return [f"input {one.name!r} holds whole numbers from {span}: pixels that were not normalised?"]


def _lone(tensor: str, stat: ExtremesStat, index: Sequence[int] | None) -> tuple[float, str] | None:
    """(how many times the others, text) where the largest rows belong to one sample."""
    if len(stat.magnitudes) < 2:
        return None
    top = int(stat.ids[0, 0])
    others = np.flatnonzero(stat.ids[:, 0] != top)
    rest = float(stat.magnitudes[others[0]] if len(others) else stat.magnitudes[-1])
    if rest <= 0 or stat.magnitudes[0] < LONE_RATIO * rest or (not len(others) and len(stat.magnitudes) < stat.capacity):
        return None
    ratio, sample = float(stat.magnitudes[0]) / rest, top if index is None else index[top]
    text = (
        f"tensor {tensor!r}: sample {sample} alone sets the min-max range: {stat.magnitudes[0]:.4g}, {ratio:.1f} times what every"
        f" other sample reaches ({rest:.4g}); look at that sample, or use --range mse"
    )
    return ratio, text


def _many(bad: Sequence[int], index: Sequence[int]) -> str:
    one = f"sample {index[bad[0]]} is"
    return one if len(bad) == 1 else f"{len(bad)} of {len(index)} samples (first: {index[bad[0]]}) are"
