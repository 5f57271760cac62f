"""Statistics on disk: one zip of .npy arrays and a JSON header, without pickle, written whole or not at all.

    header.json     format, version, the key, what was swept (graph, probes, ranges of samples), where each array lies
    float64.npy     all float64 arrays, flat, one after the other; the same for each other element type

Equal statistics give equal bytes, in whatever pieces they were gathered.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.observe import Observer, Probe, Stat
from qcompile.errors import DataError
from qcompile.ir.atomic import atomic_file

FORMAT = "qcompile-statistics"
VERSION = 2
MAX_HEADER = 1 << 28
_HEADER = "header.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)
_BROKEN = "is not a readable statistics file"

Arrays = dict[str, NDArray[Any]]
Range = tuple[int, int]


@dataclass(frozen=True)
class Key:
    """What statistics depend on: they are continued and merged only where all of it is equal.

    `model` and `data` are SHA-256 digests; `chunk` and `batch` are numbers of samples; `versions` are of qcompile and
    ONNX Runtime, whose kernels decide the last bits.
    """

    model: str
    data: str
    samples: int
    chunk: int
    batch: int
    seed: int
    versions: dict[str, str] = field(default_factory=dict[str, str])

    def differences(self, other: Key) -> list[str]:
        """One line for each part that differs."""
        names = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        return [f"{name} ({_short(getattr(self, name))} against {_short(getattr(other, name))})" for name in names]


@dataclass(frozen=True)
class Gathered:
    """One sweep, finished or not: the digest of the `graph` that ran, and the samples that `stats` hold."""

    graph: str
    ranges: tuple[Range, ...]
    stats: dict[Probe, Stat]

    def missing(self, start: int, stop: int) -> list[Range]:
        """The parts of samples `start` to `stop` that are not held."""
        gaps, at = list[Range](), start
        for low, high in self.ranges:
            if at < min(low, stop):
                gaps.append((at, min(low, stop)))
            at = max(at, high)
        return [*gaps, (at, stop)] if at < stop else gaps

    def folded(self, chunk: int, samples: int) -> Gathered:
        """The canonical form: sums over the chunks that are complete from the first sample on are added up."""
        end = self.ranges[0][1] if self.ranges and self.ranges[0][0] == 0 else 0
        done = -(-end // chunk) if end >= samples else end // chunk
        return replace(self, stats={p: s.folded(done) for p, s in self.stats.items()})


@dataclass(frozen=True)
class Statistics:
    """What a file holds: its key, the sweeps in the order of the pipeline, notes for people, and samples to verify on."""

    key: Key
    sweeps: tuple[Gathered, ...] = ()
    about: dict[str, Any] = field(default_factory=dict[str, Any])
    feeds: tuple[Arrays, ...] = ()

    def sweep_of(self, graph: str) -> Gathered | None:
        """The sweep over the graph with this digest."""
        return next((s for s in self.sweeps if s.graph == graph), None)

    def with_sweep(self, sweep: Gathered) -> Statistics:
        """With `sweep` in the place of the one over the same graph, or behind the others."""
        if self.sweep_of(sweep.graph) is None:
            return replace(self, sweeps=(*self.sweeps, sweep))
        return replace(self, sweeps=tuple(sweep if s.graph == sweep.graph else s for s in self.sweeps))

    def missing(self) -> list[Range]:
        """Samples that some sweep does not hold yet."""
        return joined(gap for s in self.sweeps for gap in s.missing(0, self.key.samples))


def joined(ranges: Any) -> list[Range]:
    """Ranges in order, those that touch or overlap as one."""
    merged: list[Range] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged


def save(path: Path, statistics: Statistics, *, sync: bool = True) -> None:
    """Write atomically.  Without `sync` the file survives the death of the process, but perhaps not that of the machine.

    Raises:
        DataError: the folder cannot be written, or the disk is full.
    """
    try:
        with atomic_file(path, sync=sync) as file:
            dump(statistics, file)
    except OSError as e:
        raise DataError(f"cannot write {path}: {e.strerror or e}; free some space or choose another place with -o") from e


def load(path: str | Path) -> Statistics:
    """Read a file with distrust.

    Raises:
        DataError: missing, not a statistics file, truncated, or of another version.
    """
    try:
        with Path(path).open("rb") as file:
            return parse(file, str(path))
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror or e}; make it with qcompile calibrate") from e


def to_bytes(statistics: Statistics) -> bytes:
    """The file's contents."""
    file = io.BytesIO()
    dump(statistics, file)
    return file.getvalue()


def from_bytes(data: bytes) -> Statistics:
    """What `to_bytes` wrote."""
    return parse(io.BytesIO(data), "statistics of a worker")


def dump(statistics: Statistics, file: BinaryIO) -> None:
    """Write to an open file."""
    pool = _Pool()
    sweeps = [_sweep_header(s.folded(statistics.key.chunk, statistics.key.samples), pool) for s in statistics.sweeps]
    texts = any(a.dtype == object for feed in statistics.feeds for a in feed.values())  # no numbers: nothing to compare on then
    feeds = [] if texts else [pool.add_all(feed) for feed in statistics.feeds]
    key = dataclasses.asdict(statistics.key)
    header = {"format": FORMAT, "version": VERSION, "key": key, "about": statistics.about, "sweeps": sweeps, "feeds": feeds}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo(_HEADER, _EPOCH), "w") as member:
            member.write(json.dumps(header, sort_keys=True).encode())
        for name, parts in sorted(pool.parts.items()):
            with archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True) as member:
                _write_flat(member, np.dtype(name), parts)


def parse(file: BinaryIO, source: str) -> Statistics:
    """Read from an open file; see `load`."""
    try:
        with zipfile.ZipFile(file) as archive:
            header = _read_header(archive, source)
            flat = {Path(i.filename).stem: _read_flat(archive, i) for i in archive.infolist() if i.filename != _HEADER}
        sweeps = tuple(_parse_sweep(s, flat) for s in header["sweeps"])
        feeds = tuple(_arrays(f, flat) for f in header["feeds"])
        return Statistics(Key(**header["key"]), sweeps, dict(header["about"]), feeds)
    except (zipfile.BadZipFile, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as e:
        raise DataError(f"{source} {_BROKEN} ({type(e).__name__}: {e}); make it again with qcompile calibrate") from e


def probe_to_json(probe: Probe) -> dict[str, Any]:
    """Tensor, kind of observer and its fields."""
    return {"tensor": probe.tensor, **probe.observer.to_json()}


def probe_from_json(document: dict[str, Any]) -> Probe:
    """What `probe_to_json` gave."""
    return Probe(str(document["tensor"]), Observer.from_json(document))


@dataclass
class _Pool:
    """Arrays by element type, and where the next one of each begins."""

    parts: dict[str, list[NDArray[Any]]] = field(default_factory=dict[str, list[NDArray[Any]]])
    ends: dict[str, int] = field(default_factory=dict[str, int])

    def add_all(self, arrays: Arrays) -> dict[str, Any]:
        return {name: self._add(array) for name, array in sorted(arrays.items())}

    def _add(self, array: NDArray[Any]) -> list[Any]:
        plain = array if array.dtype.kind in "biuf" else array.astype(np.float32)  # bfloat16 fits into float32
        kind = _name(plain.dtype)
        start = self.ends.get(kind, 0)
        self.parts.setdefault(kind, []).append(np.ascontiguousarray(plain).reshape(-1))
        self.ends[kind] = start + plain.size
        return [kind, start, list(plain.shape)]


@functools.lru_cache(maxsize=64)
def _name(dtype: np.dtype[Any]) -> str:
    """numpy works this out anew each time."""
    return dtype.name


def _write_flat(member: Any, dtype: np.dtype[Any], parts: Sequence[NDArray[Any]]) -> None:
    little = dtype.newbyteorder("<")
    shape = (sum(p.size for p in parts),)
    np.lib.format.write_array_header_1_0(member, {"descr": little.str, "fortran_order": False, "shape": shape})
    for part in parts:
        member.write(part.astype(little, copy=False).view(np.uint8).data)


def _sweep_header(sweep: Gathered, pool: _Pool) -> dict[str, Any]:
    probes = [{**probe_to_json(p), "arrays": pool.add_all(s.to_arrays())} for p, s in _ordered(sweep.stats)]
    return {"graph": sweep.graph, "ranges": [list(r) for r in sweep.ranges], "probes": probes}


def _ordered(stats: dict[Probe, Stat]) -> list[tuple[Probe, Stat]]:
    return sorted(stats.items(), key=lambda item: (item[0].tensor, repr(item[0].observer)))


def _read_header(archive: zipfile.ZipFile, source: str) -> dict[str, Any]:
    info = archive.getinfo(_HEADER)
    if info.file_size > MAX_HEADER:
        raise ValueError(f"its header of {info.file_size} bytes is too large")
    with archive.open(info) as member:
        header: Any = json.loads(member.read(MAX_HEADER))
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError("it names no such format")
    if header.get("version") != VERSION:
        raise DataError(
            f"{source} has version {header.get('version')} of the statistics format and this qcompile reads {VERSION};"
            " make it again, or use the qcompile that wrote it"
        )
    return header


def _read_flat(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    """One flat array; what its header claims must lie in the file."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    with archive.open(info) as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError(f"{info.filename} is of another .npy version")
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        if dtype.kind not in "biuf" or len(shape) != 1 or shape[0] * dtype.itemsize > info.file_size:
            raise ValueError(f"{info.filename} holds {dtype}{list(shape)}")
        raw = bytearray(member.read(shape[0] * dtype.itemsize))
        if len(raw) != shape[0] * dtype.itemsize or member.read(1):
            raise ValueError(f"{info.filename} has a wrong length")
    return np.frombuffer(raw, dtype)


def _parse_sweep(document: dict[str, Any], flat: Arrays) -> Gathered:
    read = ((probe_from_json(p), _arrays(p["arrays"], flat)) for p in document["probes"])
    stats: dict[Probe, Stat] = {probe: probe.observer.read(arrays) for probe, arrays in read}
    ranges = tuple((int(low), int(high)) for low, high in document["ranges"])
    return Gathered(str(document["graph"]), ranges, stats)


def _arrays(index: dict[str, Any], flat: Arrays) -> Arrays:
    return {name: _array(flat[kind], int(start), shape) for name, (kind, start, shape) in index.items()}


def _array(flat: NDArray[Any], start: int, shape: Sequence[int]) -> NDArray[Any]:
    size = int(np.prod(shape, dtype=np.int64))
    if start < 0 or any(d < 0 for d in shape) or start + size > flat.size:
        raise ValueError("an array lies outside of the file")
    return flat[start : start + size].reshape(shape)


def _short(value: object) -> str:
    text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    return f"{text[:12]}..." if len(text) == 64 and " " not in text else text
