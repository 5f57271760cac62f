"""Interleaved timing."""

from __future__ import annotations

import random

import numpy as np

from qcompile.execute.timing import WARM_UP, interleaved, made_up, ratios, timing


def test_runs_of_all_candidates_are_interleaved_and_seeded() -> None:
    order: list[str] = []
    seen: list[tuple[int, int]] = []

    def turns(seed: int) -> list[str]:
        order.clear()
        times = interleaved([lambda n=n: order.append(n) for n in "abc"], 8, random.Random(seed), lambda *x: seen.append(x))
        assert [len(t) for t in times] == [8, 8, 8] and all(x >= 0 for t in times for x in t)
        return order[3 * WARM_UP :]

    first = turns(0)
    assert all(sorted(first[i : i + 3]) == ["a", "b", "c"] for i in range(0, 24, 3))
    assert len({tuple(first[i : i + 3]) for i in range(0, 24, 3)}) > 1
    assert turns(0) == first and turns(1) != first and seen[7] == (8, 8)


def test_ratios_are_to_the_first() -> None:
    timed = [timing("a", [4.0, 2.0, 9.0]), timing("b", [2.0, 1.0, 2.0])]
    assert timed[0].to_json() == {"path": "a", "median_ms": 4.0, "min_ms": 2.0}
    assert ratios(timed)[1].to_json() == {"path": "b", "median": 2.0, "min": 2.0}


def test_made_up_values() -> None:
    rng = np.random.default_rng(0)
    assert made_up([2, 3], np.dtype(np.float16), rng).dtype == np.float16
    assert set(np.unique(made_up([100], np.dtype(np.int64), rng))) == {0, 1}
