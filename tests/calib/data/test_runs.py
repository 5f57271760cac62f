"""Inputs whose first axis is not the samples, scalars, inputs of unknown rank, inputs that nothing reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.calib.data import load_data
from qcompile.calib.data.dataset import Dataset
from qcompile.errors import DataError
from qcompile.execute.session import SAMPLES, batch_length
from qcompile.ir.model import InputInfo

F32 = np.float32


def info(name: str, *shape: int | str | None, dtype: Any = F32, **about: bool) -> InputInfo:
    return InputInfo(name, np.dtype(dtype), shape, **about)


X, STEP, STATE = info("x", "N", 4), info("t", 1, dtype=np.int64), info("h", 2, "N", 3)


def ones(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape, dtype=int), dtype=F32).reshape(shape)


def opened(tmp_path: Path, inputs: Sequence[InputInfo], **arrays: Any) -> Dataset:
    np.savez(tmp_path / "d.npz", **arrays)
    return load_data(str(tmp_path / "d.npz"), inputs)


def shapes(data: Dataset) -> list[dict[str, tuple[int, ...]]]:
    """Of the inputs of each run; every one counts as a single sample."""
    feeds = list(data.batches(8))
    assert data.alone and all(batch_length(f) == 1 for f in feeds)
    return [{n: a.shape for n, a in f.items() if n != SAMPLES} for f in feeds]


@pytest.mark.parametrize(
    ("inputs", "arrays", "run"),
    [
        ([X, STEP], {"x": ones(5, 4), "t": np.arange(5)}, {"x": (1, 4), "t": (1,)}),
        ([X, STATE], {"x": ones(5, 4), "h": ones(10, 1, 3)}, {"x": (1, 4), "h": (2, 1, 3)}),
        ([X, STATE], {"x": ones(5, 4), "h": ones(2, 1, 3)}, {"x": (1, 4), "h": (2, 1, 3)}),
        ([X, STATE], {"x": ones(5, 7, 4), "h": ones(5, 2, 7, 3)}, {"x": (7, 4), "h": (2, 7, 3)}),
        ([X, info("rate", dtype=np.int64)], {"x": ones(5, 4), "rate": np.array(16)}, {"x": (1, 4), "rate": ()}),
        ([X, info("rate", dtype=np.int64)], {"x": ones(5, 4), "rate": np.arange(5)}, {"x": (1, 4), "rate": ()}),
        ([X, info("one", 1, 4)], {"x": ones(5, 4), "one": ones(1, 4)}, {"x": (1, 4), "one": (1, 4)}),
    ],
)
def test_an_npz_of_runs(inputs: Any, arrays: Any, run: Any, tmp_path: Path) -> None:
    assert shapes(opened(tmp_path, inputs, **arrays)) == [run] * 5


def test_each_run_has_its_own_values(tmp_path: Path) -> None:
    data = opened(tmp_path, [X, STATE], x=ones(3, 4), h=ones(6, 1, 3))
    for i, feed in enumerate(data.batches(8)):
        assert np.array_equal(feed["x"], ones(3, 4)[i : i + 1]) and np.array_equal(feed["h"], ones(3, 2, 1, 3)[i])
    assert data.take(2).fingerprint() != data.fingerprint()


def test_numbers_of_runs_that_differ(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"different numbers of runs .*t: give 5, or one for all"):
        opened(tmp_path, [X, STEP], x=ones(5, 4), t=np.arange(3))
    with pytest.raises(DataError, match=r"'h' has shape \[5, 3\], the model needs \[2, N, 3\] a run; give \[samples, 2, N, 3\]"):
        opened(tmp_path, [X, STATE], x=ones(5, 4), h=ones(5, 3))


GRAPH = [info("nodes", "n", 4), info("edges", 2, "e", dtype=np.int64)]


def test_files_and_generators_of_runs(tmp_path: Path) -> None:
    """Graphs: as many nodes and edges as each file holds; two by chance."""
    for i, (n, e) in enumerate([(5, 9), (2, 2), (7, 3)]):
        np.savez(tmp_path / f"{i}.npz", nodes=ones(n, 4), edges=np.zeros((2, e), int))
    wanted = [{"nodes": (n, 4), "edges": (2, e)} for n, e in [(5, 9), (2, 2), (7, 3)]]
    assert shapes(load_data(str(tmp_path), GRAPH)) == wanted
    (tmp_path / "g.py").write_text(
        "import numpy as np\ndef f():\n"
        "    for n, e in [(5, 9), (2, 2), (7, 3)]:\n"
        "        yield {'nodes': np.ones((n, 4), 'f'), 'edges': np.zeros((2, e), int)}\n"
    )
    assert shapes(load_data(f"{tmp_path}/g.py:f", GRAPH)) == wanted


def test_feeds_of_samples_beside_a_state_for_all(tmp_path: Path) -> None:
    (tmp_path / "g.py").write_text(
        "import numpy as np\ndef f():\n    yield {'x': np.ones((3, 4), 'f'), 'h': np.ones((2, 1, 3), 'f')}\n"
    )
    assert shapes(load_data(f"{tmp_path}/g.py:f", [X, STATE])) == [{"x": (1, 4), "h": (2, 1, 3)}] * 3


def test_unknown_rank_is_that_of_the_data(tmp_path: Path) -> None:
    data = opened(tmp_path, [info("x", ranked=False)], x=ones(5, 7, 4))
    assert not data.alone and [f["x"].shape for f in data.batches(4)] == [(4, 7, 4), (1, 7, 4)]
    with pytest.raises(DataError, match="'x' has no shape in the file"):
        load_data("random", [info("x", ranked=False)])


def test_what_nothing_reads_is_made_up(tmp_path: Path) -> None:
    data = opened(tmp_path, [X, info("idle", "N", "T", read=False)], x=ones(5, 4))
    assert [f["idle"].shape for f in data.batches(4)] == [(4, 1), (1, 1)]


def test_made_up_runs() -> None:
    data = load_data("random", [X, STATE, STEP, info("rate")], samples=3)
    assert shapes(data) == [{"x": (1, 4), "h": (2, 1, 3), "t": (1,), "rate": ()}] * 3


def test_infinities_of_masks_are_meant(tmp_path: Path) -> None:
    mask = np.where(np.arange(4) > 1, -np.inf, 0).astype(F32)[None].repeat(5, 0)
    data = opened(tmp_path, [X, info("m", "N", 4, masks=True)], x=ones(5, 4), m=mask)
    assert np.isneginf(next(data.batches(5))["m"]).sum() == 10
    mask[3, 0] = np.nan
    data = opened(tmp_path, [X, info("m", "N", 4, masks=True)], x=ones(5, 4), m=mask)
    with pytest.raises(DataError, match="array 'm' holds NaN in sample 3"):
        list(data.batches(5))
