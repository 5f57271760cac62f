"""The kinds of DATA: how each is opened and checked against the model's inputs."""

from __future__ import annotations

import csv
import difflib
import itertools
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.data.archive import read_array
from qcompile.calib.data.dataset import Dataset
from qcompile.calib.data.made_up import RANDOM_SAMPLES, random_data
from qcompile.calib.data.pairs import PAIRS, pairs_of
from qcompile.calib.data.preprocess import Preprocess, bind, holds_pictures, load_preprocess
from qcompile.calib.data.readers import ArrayReader, Arrays, FeedReader, ImageReader
from qcompile.calib.data.runs import (
    RunReader,
    are_samples,
    as_runs,
    first_axes,
    is_run,
    ranked,
    with_unread,
)
from qcompile.calib.data.user import user_function
from qcompile.errors import DataError
from qcompile.ir.model import InputInfo

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"})
GENERATOR_SAMPLES = 512
_BROKEN = (
    OSError, ValueError, KeyError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, struct.error, zlib.error,
    lzma.LZMAError,
)  # fmt: skip
"""What reading a damaged archive raises."""


def load_data(
    spec: str,
    inputs: Sequence[InputInfo],
    preprocess: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    spare: int = 0,
) -> Dataset:
    """Open the data that `spec` names, checked against the model's `inputs`.

    Args:
        spec: a `.npz`, a folder of them, a folder of pictures, `file.py:function`, polygraphy's JSON inputs, `random`.
        inputs: the model's inputs (`Model.inputs()`).
        preprocess: for pictures: a preset or a TOML file (`qcompile.calib.data.preprocess`).
        samples: how many, spread evenly over the stored order; None takes all.
        seed: of `random`.
        spare: leave the choice to the caller: all there is, of what is made as it is read (generators, `random`) so many more.

    Raises:
        DataError: the data is missing, unreadable, or does not fit the model.
    """
    most = None if samples is None else samples + spare
    data = replace(open_source(spec, inputs, preprocess, most, seed), masks=frozenset(i.name for i in inputs if i.masks))
    if samples is not None and 0 < len(data) < samples:
        raise DataError(f"{data.source} holds {len(data)} samples, {samples} are wanted; give more data or --samples {len(data)}")
    least = data.run_size(inputs) or 1
    if len(data) < least:
        raise DataError(f"{data.source} holds {len(data)} samples and the model takes {least} a run; give more data")
    return data if samples is None or spare else data.take(samples)


def open_source(spec: str, inputs: Sequence[InputInfo], preprocess: str | None, samples: int | None, seed: int) -> Dataset:
    """Open `spec` by its kind (see `load_data`); generators give at most `samples` (512 when not given)."""
    if spec == "random":
        return random_data(inputs, samples or RANDOM_SAMPLES, seed)
    file, _, function = spec.rpartition(":")
    if file.endswith(".py") and function:
        return _generator(Path(file), function, inputs, samples or GENERATOR_SAMPLES)
    path = Path(spec)
    if not path.exists():
        raise DataError(f"no data at {spec}: check the path")
    if path.is_dir():
        return _folder(path, inputs, preprocess)
    if path.suffix == ".json":
        return _polygraphy(path, inputs)
    if path.suffix == ".npz":
        return _npz(path, inputs, preprocess)
    kinds = "a .npz (numpy.savez(file, NAME=array)), a folder, file.py:function, polygraphy's .json or 'random'"
    raise DataError(f"{spec} is no known kind of data; give {kinds}")


def _npz(path: Path, inputs: Sequence[InputInfo], preprocess: str | None) -> Dataset:
    arrays = _load_npz(path, inputs, PAIRS)
    held = {n: arrays.pop(n) for n in PAIRS if n in arrays and n not in {i.name for i in inputs}}
    data = _array_dataset(arrays, inputs, preprocess, str(path))
    return replace(data, pairs=pairs_of(held, len(data), str(path)))


def _folder(path: Path, inputs: Sequence[InputInfo], preprocess: str | None) -> Dataset:
    files = sorted(p for p in path.iterdir() if p.is_file())
    archives = [p for p in files if p.suffix == ".npz"]
    if archives:
        return _archives(path, archives, inputs, preprocess)
    pictures = [p for p in files if p.suffix.lower() in PICTURES]
    if not pictures:
        raise DataError(f"{path} holds neither .npz files nor pictures; give a folder that does")
    return _picture_dataset(path, pictures, inputs, preprocess)


def _load_npz(path: Path, inputs: Sequence[InputInfo], also: Sequence[str] = ()) -> Arrays:
    """The arrays that the model needs, `labels`, and those of `also`; other arrays are not read."""
    try:
        # Opened here, because numpy leaves a broken archive's file to the garbage collector.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} is one array, not a .npz; save it with numpy.savez(file, {inputs[0].name}=array)")
            _require_names(archive.files, inputs, str(path))
            wanted = {i.name for i in inputs} | {"labels", *also}
            return {n: read_array(path, n) for n in archive.files if n in wanted}
    except _BROKEN as e:
        if "Object arrays" in str(e):
            what = f"{path} holds Python objects, which are code and are not read"
            raise DataError(f"{what}; store numbers as numbers, texts as array.astype(str)") from e
        raise DataError(f"{path} is not a readable .npz ({e}); make one with numpy.savez") from e


def _require_names(there: Sequence[str], inputs: Sequence[InputInfo], source: str) -> None:
    missing = [i.name for i in inputs if i.read and i.name not in there]
    if not missing:
        return
    spare = [t for t in there if t not in {i.name for i in inputs} | {"labels"}]
    only = spare if len(spare) == len(missing) == 1 else []
    near = {m: difflib.get_close_matches(m, spare, n=1) or only for m in missing}
    renames = [f"rename {found[0]!r} to {m!r}" for m, found in near.items() if found]
    raise DataError(
        f"{source} holds the arrays {sorted(there)} and the model needs {[i.name for i in inputs if i.read]}; "
        f"missing: {', '.join(missing)}; {' and '.join(renames) or 'add what is missing'}"
    )


def _archives(folder: Path, files: Sequence[Path], inputs: Sequence[InputInfo], preprocess: str | None) -> Dataset:
    """One data set of all files; shapes may differ from file to file (lengths of sentences) where nothing is preprocessed."""
    parts = [_load_npz(p, inputs) for p in files]
    names = parts[0].keys()
    for part, file in zip(parts, files, strict=True):
        if part.keys() != names:
            raise DataError(f"{file} holds {sorted(part)} and {files[0]} holds {sorted(names)}; give all files the same arrays")
    if all(len({p[n].shape[1:] for p in parts}) == 1 for n in names) and not _whole_runs(parts, inputs):
        return _array_dataset({n: np.concatenate([p[n] for p in parts]) for n in names}, inputs, preprocess, str(folder))
    if preprocess is not None:
        raise DataError(f"the arrays of {folder} differ in shape; pictures to preprocess need one size, or a folder of pictures")
    return _varied(folder, parts, inputs)


def _whole_runs(parts: Sequence[Arrays], inputs: Sequence[InputInfo]) -> bool:
    return any(is_run(ranked(inputs, p), p) for p in (with_unread(inputs, part) for part in parts))


def _varied(folder: Path, parts: Sequence[Arrays], inputs: Sequence[InputInfo]) -> Dataset:
    data = _feed_dataset(parts, inputs, str(folder))
    if "labels" in data.names or "labels" not in parts[0]:
        return data
    labels = np.concatenate([p["labels"] for p in parts])
    _require_equal_lengths({data.names[0]: np.empty(len(data)), "labels": labels}, str(folder))
    return replace(data, all_labels=labels)


def _array_dataset(arrays: Arrays, inputs: Sequence[InputInfo], preprocess: str | None, source: str) -> Dataset:
    labels = arrays.pop("labels", None) if all(i.name != "labels" for i in inputs) else None
    arrays = with_unread(inputs, arrays)
    inputs = ranked(inputs, arrays)
    if preprocess is None and not are_samples(inputs, arrays) and _are_runs(inputs, arrays):
        return _run_dataset(arrays, inputs, source, labels)
    pictures = {i.name: p for i in inputs if (p := _picture_rule(arrays[i.name], i, preprocess))}
    if preprocess is not None and not pictures:
        raise DataError(f"{source}: no uint8 pictures to preprocess; leave --preprocess out")
    for info in inputs:
        if info.name not in pictures:
            _require_fit(arrays[info.name], info, source)
    _require_equal_lengths({**arrays, **({} if labels is None else {"labels": labels})}, source)
    reader = ArrayReader(arrays, {i.name: i.dtype for i in inputs}, pictures)
    return Dataset(reader, tuple(range(len(reader))), tuple(i.name for i in inputs), source, labels)


def _are_runs(inputs: Sequence[InputInfo], arrays: Arrays) -> bool:
    """Whether the arrays may hold whole runs: an input has a first axis of its own, or an array one more than its input."""
    ranks = {i.name: len(i.shape) for i in inputs}
    own = any(not shape or isinstance(shape[0], int) for shape in (i.shape for i in inputs))
    return own or any(np.ndim(a) == ranks[n] + 1 for n, a in arrays.items() if n in ranks)


def _run_dataset(arrays: Arrays, inputs: Sequence[InputInfo], source: str, labels: NDArray[Any] | None) -> Dataset:
    for info in inputs:
        _require_dtype(arrays[info.name], info, source)
    runs = as_runs(inputs, arrays, source)
    _require_equal_lengths({**runs, **({} if labels is None else {"labels": labels})}, source)
    reader = RunReader(runs, {i.name: i.dtype for i in inputs})
    return Dataset(reader, tuple(range(len(reader))), tuple(i.name for i in inputs), source, labels, alone=True)


def _picture_rule(array: NDArray[Any], info: InputInfo, preprocess: str | None) -> Preprocess | None:
    if preprocess is None or not holds_pictures(array) or info.dtype.kind not in "fV":
        return None
    return bind(load_preprocess(preprocess), info)


def _require_fit(array: NDArray[Any], info: InputInfo, source: str) -> None:
    """Dtype and shape of stored samples against the input; integers may change width when no value is lost."""
    _require_dtype(array, info, source)
    expected = info.shape[1:]
    fits = array.ndim == len(info.shape) and all(
        not isinstance(want, int) or want == have for want, have in zip(expected, array.shape[1:], strict=True)
    )
    if not fits:
        shown = ", ".join(["samples", *map(str, expected)])
        raise DataError(f"{source}: array {info.name!r} has shape {list(array.shape)}, the model needs [{shown}]; reshape it")


def _require_dtype(array: NDArray[Any], info: InputInfo, source: str) -> None:
    if array.dtype == info.dtype or (array.dtype.kind == "f" and info.dtype.kind in "fV"):
        return
    if array.dtype.kind in "iu" and info.dtype.kind in "iu" and _fits_integers(array, info.dtype):
        return
    if array.dtype.kind in "US" and info.dtype.kind == "O":
        return
    problem = f"{source}: array {info.name!r} is {array.dtype}, the model needs {info.dtype}"
    if array.dtype == np.uint8 and info.dtype.kind == "f":
        raise DataError(f"{problem}; name the pictures' preprocessing with --preprocess (e.g. imagenet), or store floats")
    raise DataError(f"{problem.replace('needs object', 'needs texts')}; convert it")


def _fits_integers(array: NDArray[Any], dtype: np.dtype[Any]) -> bool:
    limits = np.iinfo(dtype)
    return not array.size or (int(array.min()) >= limits.min and int(array.max()) <= limits.max)


def _require_equal_lengths(arrays: Arrays, source: str) -> None:
    lengths = {n: len(a) if a.ndim else 0 for n, a in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{source}: the arrays hold different numbers of samples ({lengths}); the first axis must be the samples")


def _picture_dataset(folder: Path, files: Sequence[Path], inputs: Sequence[InputInfo], preprocess: str | None) -> Dataset:
    if len(inputs) != 1:
        raise DataError(f"{folder} holds pictures and the model has {len(inputs)} inputs; give a .npz with all of them")
    if preprocess is None:
        raise DataError(f"{folder} holds pictures: say how they become inputs with --preprocess (e.g. imagenet, or a .toml file)")
    rule = bind(load_preprocess(preprocess), inputs[0])
    files, labels = _with_labels(folder, files)
    reader = ImageReader(inputs[0].name, inputs[0].dtype, tuple(files), rule)
    return Dataset(reader, tuple(range(len(files))), (inputs[0].name,), str(folder), labels)


def _with_labels(folder: Path, files: Sequence[Path]) -> tuple[Sequence[Path], NDArray[np.int64] | None]:
    """Order and labels from `labels.csv` (columns file and class_index or label), if there is one."""
    table = folder / "labels.csv"
    if not table.is_file():
        return files, None
    with table.open(newline="") as f:
        rows = list(csv.DictReader(f))
    column = next((c for c in ("class_index", "label") if rows and c in rows[0]), None)
    if column is None or "file" not in rows[0]:
        raise DataError(f"{table} needs the columns file and class_index (or label); see its first line")
    try:
        labels = {folder / r["file"]: int(r[column]) for r in rows}
    except (TypeError, ValueError) as e:
        raise DataError(f"{table}: a {column} is not a whole number ({e}); correct that line") from e
    outside = next((r["file"] for r in rows if not _inside(folder, r["file"])), None)
    if outside is not None:
        raise DataError(f"{table} names {outside}, which lies outside of {folder}; name files of that folder")
    absent = [p for p in labels if not p.is_file()]
    if absent:
        raise DataError(f"{table} names {absent[0].name}, which is not in {folder}; remove that line or add the file")
    return list(labels), np.array(list(labels.values()), np.int64)


def _inside(folder: Path, name: str) -> bool:
    """By its text: links in the folder are the user's own."""
    return os.path.normpath(folder / name).startswith(os.path.normpath(folder) + os.sep)


def _polygraphy(path: Path, inputs: Sequence[InputInfo]) -> Dataset:
    from polygraphy.json import load_json

    try:
        feeds: Any = load_json(str(path))
        listed = [dict(f) for f in ([feeds] if isinstance(feeds, dict) else feeds)]
    except Exception as e:  # polygraphy raises its own and built-in errors alike
        raise DataError(f"{path} is not a file of polygraphy inputs ({_last_line(e)}); make it with --save-inputs") from e
    return _feed_dataset(listed, inputs, str(path))


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _generator(path: Path, function: str, inputs: Sequence[InputInfo], samples: int) -> Dataset:
    """At most `samples` samples of a user's function, held in memory; it yields dicts, or arrays for a single input."""
    produce = user_function(path, function)
    source = f"{path}:{function}"

    def feeds() -> Iterator[Arrays]:
        try:
            for item in produce():
                yield item if isinstance(item, dict) else _single(item, inputs, source)
        except DataError:
            raise
        except Exception as e:  # whatever the user's function raises
            raise DataError(f"{source} failed ({type(e).__name__}: {e}); run it with python first") from e

    return _feed_dataset(feeds(), inputs, source, samples)


def _single(item: Any, inputs: Sequence[InputInfo], source: str) -> Arrays:
    if len(inputs) != 1:
        raise DataError(f"{source} yields bare arrays and the model has the inputs {[i.name for i in inputs]}; yield dicts")
    return {inputs[0].name: np.asarray(item)}


def _feed_dataset(feeds: Iterable[Arrays], inputs: Sequence[InputInfo], source: str, limit: int | None = None) -> Dataset:
    """The first `limit` samples of the feeds (all when None)."""
    given = list(_limited((_given(f, inputs, source) for f in feeds), inputs, limit))
    if not given:
        raise DataError(f"{source} gives no samples; it must give at least one")
    inputs = ranked(inputs, given[0])
    whole, mixed = any(is_run(inputs, f) for f in given), len(first_axes(inputs)) > 1
    split = _as_it_is if whole else _runs_of if mixed else _split
    held = tuple(itertools.chain.from_iterable(split(f, inputs, source) for f in given))[:limit]
    return Dataset(FeedReader(held), tuple(range(len(held))), tuple(i.name for i in inputs), source, alone=whole or mixed)


def _limited(feeds: Iterable[Arrays], inputs: Sequence[InputInfo], limit: int | None) -> Iterator[Arrays]:
    """Feeds until they hold `limit` samples."""
    held = 0
    for feed in feeds:
        if limit is not None and held >= limit:
            return
        held += 1 if is_run(inputs, feed) else max((len(a) for a in feed.values() if a.ndim), default=1)
        yield feed


def _given(feed: Arrays, inputs: Sequence[InputInfo], source: str) -> Arrays:
    """The arrays that the model takes, in its element types; those without the batch axis get one."""
    _require_names(list(feed), inputs, source)
    named = with_unread(inputs, {n: np.asarray(a) for n, a in feed.items()})
    for info in inputs:
        _require_dtype(named[info.name], info, source)
    return {i.name: _with_batch_axis(named[i.name].astype(i.dtype, copy=False), i) for i in inputs}


def _as_it_is(feed: Arrays, inputs: Sequence[InputInfo], source: str) -> list[Arrays]:
    for info in inputs:
        if feed[info.name].ndim != len(info.shape):
            _require_fit(feed[info.name], info, source)
    return [feed]


def _runs_of(feed: Arrays, inputs: Sequence[InputInfo], source: str) -> list[Arrays]:
    runs = as_runs(inputs, feed, source)
    return [{n: a[k] for n, a in runs.items()} for k in range(len(next(iter(runs.values()))))]


def _split(feed: Arrays, inputs: Sequence[InputInfo], source: str) -> list[Arrays]:
    """One feed as samples with a leading axis of 1."""
    for info in inputs:
        if info.shape:
            _require_fit(feed[info.name], info, source)
    batched = {n: a for n, a in feed.items() if a.ndim}
    _require_equal_lengths(batched, source)
    count = len(next(iter(batched.values()))) if batched else 1
    return [{n: a[k : k + 1] if a.ndim else a for n, a in feed.items()} for k in range(count)]


def _with_batch_axis(array: NDArray[Any], info: InputInfo) -> NDArray[Any]:
    return array[None] if info.ranked and array.ndim == len(info.shape) - 1 else array
