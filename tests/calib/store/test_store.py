from __future__ import annotations

import io
import itertools
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.calib.observe import (
    CHUNK,
    AbsMax,
    ChannelHistograms,
    Extremes,
    Histogram,
    MinMax,
    Moments,
    Observer,
    Probe,
    Rows,
    SecondMoment,
)
from qcompile.calib.store.merge import merge, words
from qcompile.calib.store.store import (
    Gathered,
    Key,
    Statistics,
    from_bytes,
    joined,
    load,
    probe_from_json,
    probe_to_json,
    save,
    to_bytes,
)
from qcompile.errors import DataError

OBSERVERS: tuple[Any, ...] = (
    MinMax(),
    MinMax(-1),
    AbsMax(-1),
    Histogram(64),
    ChannelHistograms(bins=32),
    Moments(-1),
    SecondMoment(),
    Rows(7),
    Extremes(3),
)
SAMPLES = 4 * CHUNK + 10
X = np.random.default_rng(0).standard_t(3, (SAMPLES, 3, 5)).astype(np.float32)
KEY = Key("m" * 64, "d" * 64, SAMPLES, CHUNK, 8, 0, {"qcompile": "1"})


def gathered(start: int, stop: int, batch: int = 8) -> Gathered:
    """Samples `start` to `stop`, batch by batch, as a sweep would."""
    stats: dict[Probe, Any] = {Probe("x", o): o.empty() for o in OBSERVERS}
    at = start
    while at < stop:
        end = min(at + batch, stop, (at // CHUNK + 1) * CHUNK)
        stats = {p: s.merge(p.observer.observe(X[at:end], at)).folded(at // CHUNK) for p, s in stats.items()}
        at = end
    return Gathered("graph", ((start, stop),) if stop > start else (), stats)


def statistics(start: int = 0, stop: int = SAMPLES) -> Statistics:
    return Statistics(KEY, (gathered(start, stop),))


WHOLE = to_bytes(statistics())


def test_every_observer_comes_back_bit_for_bit(tmp_path: Path) -> None:
    made = replace(statistics(), about={"source": "x"}, feeds=({"x": X[:1], "t": np.array([3], np.int64)},))
    save(tmp_path / "s.qstats", made)
    read = load(tmp_path / "s.qstats")
    assert to_bytes(read) == (tmp_path / "s.qstats").read_bytes() == to_bytes(made)
    assert read.key == KEY and read.about == {"source": "x"} and read.sweeps[0].ranges == ((0, SAMPLES),)
    np.testing.assert_array_equal(read.feeds[0]["x"], X[:1])
    direct = SecondMoment().observe(X)
    np.testing.assert_allclose(read.sweeps[0].stats[Probe("x", SecondMoment())].xtx, direct.xtx, rtol=1e-12)
    assert [p.name for p in tmp_path.iterdir()] == ["s.qstats"]


@pytest.mark.parametrize("kind", Observer.kinds)
def test_every_kind_of_observer_has_a_name(kind: str) -> None:
    observer = Observer.kinds[kind]()
    assert probe_from_json(json.loads(json.dumps(probe_to_json(Probe("a/b", observer))))) == Probe("a/b", observer)
    empty = Statistics(KEY, (Gathered("g", (), {Probe("x", observer): observer.empty()}),))
    assert to_bytes(from_bytes(to_bytes(empty))) == to_bytes(empty)


@settings(deadline=None, max_examples=25)
@given(cuts=st.sets(st.integers(1, 4)), order=st.randoms())
def test_shards_in_any_order_give_the_bytes_of_one_run(cuts: set[int], order: Any) -> None:
    ends = [0, *(c * CHUNK for c in sorted(cuts)), SAMPLES]
    shards = [statistics(a, b) for a, b in itertools.pairwise(ends)]
    order.shuffle(shards)
    read = [(f"{i}", from_bytes(to_bytes(s))) for i, s in enumerate(shards)]
    assert to_bytes(merge(read)) == WHOLE


@settings(deadline=None, max_examples=25)
@given(shards=st.permutations(range(5)), pivot=st.integers(1, 4))
def test_merging_is_associative(shards: list[int], pivot: int) -> None:
    parts = [("s", statistics(i * CHUNK, min((i + 1) * CHUNK, SAMPLES))) for i in shards]
    left = [("l", merge(parts[:pivot])), ("r", merge(parts[pivot:]))]
    assert to_bytes(merge(left)) == WHOLE


def test_what_differs_is_named() -> None:
    other = replace(statistics(CHUNK), key=replace(KEY, data="e" * 64, batch=4))
    with pytest.raises(DataError, match=r"b does not belong to a: .*data \(dddddddddddd... against eeeeeeeeeeee...\); batch \(8"):
        merge([("a", statistics(0, CHUNK)), ("b", other)])


def test_overlaps_and_other_probes_are_refused() -> None:
    with pytest.raises(DataError, match="a and b both hold samples 64-127; leave one of them out"):
        merge([("a", statistics(0, 2 * CHUNK)), ("b", statistics(CHUNK, SAMPLES))])
    few = statistics(CHUNK, SAMPLES)
    sweep = few.sweeps[0]
    few = few.with_sweep(replace(sweep, stats={p: s for p, s in sweep.stats.items() if p.observer != MinMax()}))
    with pytest.raises(DataError, match="1 probes are only in one of them"):
        merge([("a", statistics(0, CHUNK)), ("b", few)])


def test_missing_samples_are_known() -> None:
    merged = merge([("a", statistics(CHUNK, 2 * CHUNK)), ("b", statistics(3 * CHUNK, SAMPLES))])
    assert merged.missing() == [(0, CHUNK), (2 * CHUNK, 3 * CHUNK)]
    assert words(merged.missing()) == "samples 0-63, 128-191"
    assert merged.sweeps[0].missing(CHUNK, 2 * CHUNK) == []
    assert joined([(5, 7), (0, 2), (2, 4), (6, 9)]) == [(0, 4), (5, 9)]


def rewritten(change: Any) -> bytes:
    """The file with its members passed through `change(name, data)`."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return out.getvalue()


def header(**changes: Any) -> Any:
    return lambda name, data: json.dumps(json.loads(data) | changes) if name == "header.json" else data


def outside(name: str, data: bytes) -> bytes | str:
    if name != "header.json":
        return data
    document = json.loads(data)
    for array in document["sweeps"][0]["probes"][0]["arrays"].values():
        array[1] += 10**9
    return json.dumps(document)


def pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    return file.getvalue()


def bomb() -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)})
    return file.getvalue()


def compressed() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(WHOLE)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


def flipped() -> bytes:
    middle = len(WHOLE) // 2
    return WHOLE[:middle] + bytes([WHOLE[middle] ^ 1]) + WHOLE[middle + 1 :]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no zip at all",
        WHOLE[: len(WHOLE) // 2],
        flipped(),
        compressed(),
        rewritten(header(format="other")),
        rewritten(header(sweeps=3)),
        rewritten(header(key={"model": "m"})),
        rewritten(outside),
        rewritten(lambda name, data: None if name == "float64.npy" else data),
        rewritten(lambda name, data: pickled() if name == "float64.npy" else data),
        rewritten(lambda name, data: bomb() if name == "float64.npy" else data),
    ],
    ids=["empty", "text", "truncated", "bit", "compressed", "format", "sweeps", "key", "outside", "missing", "pickle", "bomb"],
)
def test_broken_files_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.qstats").write_bytes(data)
    with pytest.raises(DataError, match=r"is not a readable statistics file .*; make it again with qcompile calibrate"):
        load(tmp_path / "s.qstats")


def test_other_versions_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "s.qstats").write_bytes(rewritten(header(version=99)))
    with pytest.raises(DataError, match="version 99 of the statistics format and this qcompile reads 2"):
        load(tmp_path / "s.qstats")
    with pytest.raises(DataError, match=r"cannot read .*; make it with qcompile calibrate"):
        load(tmp_path / "none.qstats")
    with pytest.raises(DataError, match="cannot write"):
        save(tmp_path / "no" / "s.qstats", statistics())
