from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.calib.data import Dataset, load_data
from qcompile.calib.data.checks import EXTREME_ROWS, check_data, check_ranges, shapes, with_extremes
from qcompile.calib.data.readers import FeedReader
from qcompile.calib.observe import Extremes, Histogram, MinMax, Probe
from qcompile.ir.model import InputInfo

PICTURES = [InputInfo("x", np.dtype(np.float32), ("N", 3, 8, 8))]


def pictures(n: int = 20) -> Any:
    return np.random.default_rng(0).normal(0, 0.7, (n, 3, 8, 8)).clip(-2, 2).astype(np.float32)


def warnings(tmp_path: Path, preprocess: str | None = None, **arrays: Any) -> list[str]:
    np.savez(tmp_path / "d.npz", **arrays)
    inputs = [InputInfo(n, a.dtype, ("N", *a.shape[1:])) for n, a in arrays.items()]
    return check_data(load_data(str(tmp_path / "d.npz"), inputs), inputs, preprocess)


def test_good_data_is_not_complained_about(tmp_path: Path) -> None:
    ids = np.random.default_rng(1).integers(1, 99, (20, 12))
    mask, step = np.ones((20, 12), np.int64), np.arange(20)[:, None]
    assert warnings(tmp_path, x=pictures(), ids=ids, mask=mask, step=step) == []
    mask[3:, 8:] = 0
    assert warnings(tmp_path, ids=ids, mask=mask) == []
    mask[5] = 0
    assert "sample 5 is constant (all 0)" in warnings(tmp_path, ids=ids, mask=mask)[0]


def test_a_black_background_is_not_clipping(tmp_path: Path) -> None:
    x = np.maximum(pictures(), 0.1) - 1
    assert warnings(tmp_path, x=x) == []


def test_constant_samples(tmp_path: Path) -> None:
    x = pictures()
    x[4], x[7] = 0.25, -0.5
    assert warnings(tmp_path, x=x) == [
        "input 'x': 2 of 20 samples (first: 4) are constant (all 0.25): blank or damaged? Remove them"
    ]


def test_repeated_samples(tmp_path: Path) -> None:
    x = pictures()
    x[9], x[11] = x[3], x[3]
    assert warnings(tmp_path, x=x) == ["2 of 20 samples repeat another (sample 9 is sample 3): they add nothing; remove them"]


def test_clipped_samples(tmp_path: Path) -> None:
    x = pictures()
    x[6] = (x[6] * 9).clip(-2, 2)
    found = warnings(tmp_path, x=x)
    assert (
        len(found) == 2 and found[0].startswith("input 'x': sample 6 is clipped: up to 40 %") and "the smallest, -2" in found[0]
    )


def test_an_input_whose_range_one_sample_sets(tmp_path: Path) -> None:
    x = pictures()
    x[13, 0, 0, 0] = 50
    (found,) = warnings(tmp_path, x=x)
    assert found.startswith("input 'x': sample 13 alone sets the range: it reaches 50, every other one at most")


@pytest.mark.parametrize(
    ("preprocess", "scale", "words"),
    [
        ("imagenet", 1.0, None),
        ("imagenet", 5.0, "was the data prepared in another way?"),
        ("zero-to-one", 1.0, "the declared preprocessing zero-to-one gives 0 to 1: was the data prepared in another way?"),
    ],
)
def test_declared_normalisation(preprocess: str, scale: float, words: str | None, tmp_path: Path) -> None:
    found = warnings(tmp_path, preprocess, x=pictures() * np.float32(scale))
    assert found == [] if words is None else any(words in f for f in found)


def test_pixels_that_were_not_normalised(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8)).astype(np.float32)
    assert "pixels that were not normalised?" in warnings(tmp_path, x=x)[-1]


def test_shapes_over_all_samples() -> None:
    feeds = tuple({"ids": np.ones((1, n), np.int64), "k": np.asarray(3)} for n in (5, 9, 7, 9))
    data = Dataset(FeedReader(feeds), tuple(range(4)), ("ids", "k"), "feeds")
    assert shapes(data) == {"ids": {"min": [1, 5], "max": [1, 9]}, "k": {"min": [], "max": []}}


def test_tensors_whose_range_one_sample_sets() -> None:
    x = np.random.default_rng(0).normal(size=(40, 6, 8)).astype(np.float32)
    even = Extremes(EXTREME_ROWS).observe(x)
    x[17] *= 30
    lone = Extremes(EXTREME_ROWS).observe(x)
    probe = Probe("h", Extremes(EXTREME_ROWS))
    assert check_ranges({probe: even, Probe("h", MinMax()): MinMax().observe(x)}) == []
    (found,) = check_ranges({probe: lone}, index=range(100, 140))
    assert (
        found.startswith("tensor 'h': sample 117 alone sets the min-max range")
        and "times what every other sample reaches" in found
    )
    many = check_ranges({Probe(f"t{i}", Extremes(EXTREME_ROWS)): lone for i in range(8)})
    assert len(many) == 6 and many[-1] == "... and 3 more tensors whose range one sample sets"


def test_only_whole_tensor_min_max_is_asked_about() -> None:
    probes = [Probe("a", MinMax()), Probe("b", MinMax(-1)), Probe("c", Histogram())]
    assert with_extremes(probes) == [*probes, Probe("a", Extremes(EXTREME_ROWS))]
