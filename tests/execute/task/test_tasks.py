"""What each task's metric says of two models' outputs, and which one is chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import rankdata, spearmanr

from qcompile.errors import DataError, UsageError
from qcompile.execute.figures import OutputTally
from qcompile.execute.parts import Join, PartTally
from qcompile.execute.task.binary import Binary
from qcompile.execute.task.choice import Asked, choose
from qcompile.execute.task.classification import Classification
from qcompile.execute.task.custom import Custom
from qcompile.execute.task.detection import Detection
from qcompile.execute.task.embeddings import Embeddings, Pairs
from qcompile.execute.task.metric import Batch, Metric
from qcompile.execute.task.regression import Regression
from qcompile.execute.task.score import Means, Score, interval, ranks
from qcompile.ir.jumps import Nature

RNG = np.random.default_rng(0)
Array = NDArray[Any]
N = 60


def measured(metric: Metric, before: Array, after: Array, labels: Array | None = None, size: int = 16) -> dict[str, Score]:
    """The scores of output `y` after batches of `size`."""
    for at in range(0, len(before), size):
        part = slice(at, at + size)
        rows = range(len(before))[part]
        metric.add(Batch({"y": before[part]}, {"y": after[part]}, rows, None if labels is None else labels[part]))
    return {s.name: s for s in metric.scores()}


def noisy(x: Array, size: float = 0.5) -> Array:
    return x + size * RNG.standard_normal(x.shape)


@pytest.mark.parametrize(("shape", "axis"), [((N, 9), -1), ((N, 7, 9), -1), ((N, 9, 3, 2), 1)])
def test_classification_with_labels(shape: tuple[int, ...], axis: int) -> None:
    before = RNG.standard_normal(shape)
    after, labels = noisy(before), RNG.integers(0, 9, np.delete(shape, axis))
    found = measured(Classification("y", axis), before, after, labels)
    assert [*found] == ["top1", "top5", "nll", "agreement"]
    z, b = np.moveaxis(after, axis, -1), np.moveaxis(before, axis, -1)
    assert found["top1"].candidate == pytest.approx((z.argmax(-1) == labels).mean())
    best = np.argsort(-z, -1)[..., :5]
    assert found["top5"].candidate == pytest.approx((best == labels[..., None]).any(-1).mean())
    chosen = np.take_along_axis(z, labels[..., None], -1)[..., 0]
    assert found["nll"].candidate == pytest.approx((np.log(np.exp(z).sum(-1)) - chosen).mean())
    assert found["agreement"].candidate == pytest.approx((z.argmax(-1) == b.argmax(-1)).mean())
    top1 = found["top1"]
    assert top1.low is not None and top1.high is not None and top1.difference is not None
    assert top1.low < top1.difference < top1.high and top1.n == N


def test_entries_without_a_label_do_not_count() -> None:
    before, labels = RNG.standard_normal((N, 7, 4)), RNG.integers(0, 4, (N, 7))
    left = labels.copy()
    left[:, 3:] = -100
    assert measured(Classification("y"), before, before, left)["top1"].candidate == pytest.approx(
        (before.argmax(-1) == labels)[:, :3].mean()
    )
    with pytest.raises(DataError, match="4 classes"):
        measured(Classification("y"), before, before, labels + 1)


def test_two_classes_by_one_number() -> None:
    before = RNG.standard_normal((N, 1))
    labels = (noisy(before) > 0).astype(np.int64)[:, 0]
    logits = measured(Binary("y"), before, noisy(before), labels)
    shares = measured(Binary("y"), 1 / (1 + np.exp(-before)), 1 / (1 + np.exp(-before)), labels)
    assert logits["top1"].reference == shares["top1"].reference == ((before[:, 0] > 0) == labels).mean()
    one, zero = before[labels == 1, 0], before[labels == 0, 0]
    assert logits["auc"].reference == pytest.approx((one[:, None] > zero).mean())


def test_regression_against_targets_and_without() -> None:
    target = RNG.standard_normal((N, 3))
    before, after = noisy(target, 0.1), noisy(target, 0.2)
    found = measured(Regression("y"), before, after, target)
    error = after - target
    assert found["mae"].candidate == pytest.approx(np.abs(error).mean())
    assert found["rmse"].candidate == pytest.approx(np.sqrt(np.square(error).mean()))
    assert found["r2"].candidate == pytest.approx(1 - np.square(error).sum() / np.square(target - target.mean()).sum())
    low, high = found["rmse"].low, found["rmse"].high
    assert low is not None and high is not None and 0 < low < (found["rmse"].difference or 0) < high
    alone = measured(Regression("y"), before, after)
    assert alone["mae"].reference is None and alone["mae"].candidate == pytest.approx(np.abs(after - before).mean())
    assert alone["mae"].low is not None and alone["mae"].low < alone["mae"].candidate
    assert np.isnan(measured(Regression("y"), np.ones((4, 1)), np.ones((4, 1)))["r2"].candidate)


@pytest.mark.parametrize("size", [3, 16, N])
def test_embeddings_and_the_ranks_of_pairs(size: int) -> None:
    before = RNG.standard_normal((N, 8))
    after, pairs = noisy(before), Pairs(RNG.permutation(N).reshape(30, 2), RNG.integers(0, 6, 30).astype(float))
    found = measured(Embeddings("y", pairs), before, after, size=size)

    def cosine(a: Array, b: Array) -> Array:
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    assert found["cosine"].candidate == pytest.approx(cosine(before, after).mean())
    assert found["lowest cosine"].candidate == pytest.approx(cosine(before, after).min())
    for x, value in ((before, found["spearman"].reference), (after, found["spearman"].candidate)):
        expected: Any = spearmanr(cosine(*x[pairs.rows.T]), pairs.scores)
        assert value == pytest.approx(expected.statistic)
    assert found["spearman"].low is not None and found["spearman"].n == 30
    with pytest.raises(DataError, match="one vector a sample"):
        measured(Embeddings("y", pairs), before[:, None], after[:, None])


def test_detection_says_each_part_in_its_own_unit() -> None:
    x = np.concatenate([RNG.uniform(0, 640, (8, 4, 9)), RNG.uniform(0, 1, (8, 6, 9))], 1)
    tally = OutputTally("y", Nature(), parts=PartTally(Join(1, (("boxes", 4), ("scores", 6)))))
    after = x + np.concatenate([np.full((8, 4, 9), 0.5), np.full((8, 6, 9), 0.01)], 1)
    found = measured(Detection([tally]), x, after)
    assert found["rms error of boxes"].candidate == pytest.approx(0.5)
    assert found["rms error of scores"].candidate == pytest.approx(0.01)
    assert found["SQNR of scores"].candidate < found["SQNR of boxes"].candidate


def custom(function: Callable[..., Any], before: Array, after: Array, labels: Array | None = None) -> dict[str, Score]:
    return measured(Custom(function, "file.py:mine"), before, after, labels)


def test_a_function_of_the_user_sees_all_samples(capsys: pytest.CaptureFixture[str]) -> None:
    before, labels = RNG.standard_normal((N, 4)), np.arange(N)

    def mine(outputs: dict[str, Array], labels: Array, rows: Array) -> dict[str, Any]:
        print("not on standard output")
        assert (rows == labels).all() and outputs["y"].shape == (N, 4)
        return {"sum": outputs["y"].sum(), "each": outputs["y"][:, 0], "right": outputs["y"][:, 0] > 0}

    found = custom(mine, before, before + 1, labels)
    assert found["sum"].difference == pytest.approx(4 * N) and found["sum"].low is None
    assert found["each"].difference == pytest.approx(1) and found["each"].low == pytest.approx(1)
    assert found["right"].share and found["right"].candidate == (before[:, 0] > -1).mean()
    assert capsys.readouterr().out == ""
    assert custom(lambda outputs: 2.5, before, before)["mine"].candidate == 2.5


def test_samples_of_other_shapes_come_as_a_list() -> None:
    metric = Custom(lambda outputs: float(len(outputs["y"])), "f.py:count")
    for rows, length in (((0, 1), 3), ((2,), 5)):
        metric.add(Batch({"y": np.zeros((len(rows), length))}, {"y": np.zeros((len(rows), length))}, rows))
    assert metric.scores()[0].candidate == 3


def leaves(outputs: Any) -> None:
    raise SystemExit(1)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda outputs: outputs["nope"], "failed on the reference's outputs .KeyError: 'nope', line"),
        (leaves, "SystemExit"),
        (lambda outputs: "good", "returns a str; return a number"),
        (lambda outputs: np.zeros((2, 2)), r"array of shape \[2, 2\]"),
        (lambda outputs: {}, "empty mapping"),
        (lambda: 1, r"takes \(\)"),
        (lambda a, b, c: 1, "takes .a, b, c."),
    ],
)
def test_a_function_that_fails_is_a_message(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        custom(function, np.zeros((3, 2)), np.zeros((3, 2)))


TALLY = [OutputTally("hidden", Nature()), OutputTally("y", Nature())]
ROWS = RNG.standard_normal((4, 6))
UNIT = ROWS / np.linalg.norm(ROWS, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("outputs", "labels", "kind", "of"),
    [
        ({"a": ROWS[:, :3], "y": ROWS}, np.array([0, 5, 1, 2]), Classification, "a"),
        ({"a": ROWS[:, :, None] * np.ones(2), "y": ROWS}, np.array([0, 5, 1, 2]), Classification, "y"),
        ({"y": ROWS.reshape(4, 6, 1, 1)}, np.array([0, 5, 1, 2]), Classification, "y"),
        ({"y": ROWS[:, :1]}, np.array([0, 1, 1, 0]), Binary, "y"),
        ({"y": ROWS[:, :1]}, np.array([0, 7, 1, 0]), Regression, "y"),
        ({"a": ROWS, "y": ROWS[:, :1]}, np.array([0.5, 7, 1, 0]), Regression, "y"),
        ({"y": ROWS}, None, Classification, "y"),
        ({"y": UNIT}, None, Embeddings, "y"),
        ({"sentence_embedding": ROWS}, None, Embeddings, "sentence_embedding"),
        ({"y": ROWS.reshape(4, 1, 2, 3)}, None, Regression, "y"),
        ({"boxes": ROWS, "scores": ROWS, "ids": np.ones((4, 2), np.int64)}, None, Detection, None),
    ],
)
def test_the_task_follows_from_labels_and_outputs(
    outputs: dict[str, Array], labels: Array | None, kind: type[Metric], of: str | None
) -> None:
    found = choose(Asked(), [OutputTally(n, Nature()) for n in outputs], Batch(outputs, outputs, range(4), labels))
    assert isinstance(found.metric, kind) and found.output == of and not found.warning


def test_labels_that_fit_nothing_are_said_or_refused() -> None:
    batch = Batch({"y": ROWS}, {"y": ROWS}, range(4), np.zeros((4, 9)))
    assert "fit no output (y [4, 6])" in choose(Asked(), TALLY[1:], batch).warning
    with pytest.raises(DataError, match="as regression asks"):
        choose(Asked("regression"), TALLY[1:], batch)
    with pytest.raises(UsageError, match="did you mean 'hidden'"):
        choose(Asked(on="hiden"), TALLY, Batch({"hidden": ROWS, "y": ROWS}, {"hidden": ROWS, "y": ROWS}, range(4)))


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    inside = 0
    for _ in range(400):
        before, after = RNG.random(80) < 0.9, RNG.random(80) < 0.85
        means = Means()
        means.add(after.astype(float), before.astype(float))
        found = means.score("top1", paired=True, share=True)
        inside += (found.low or 0) <= -0.05 <= (found.high or 0)
    assert 0.92 < inside / 400 < 0.99


def test_all_right_is_no_certainty() -> None:
    low, high = interval(np.ones(200), np.zeros(200), (-1, 1))
    assert low is not None and high is not None and -0.02 < low < 0 < high < 0.02
    assert interval(np.ones(1), np.ones(1)) == (None, None)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_ranks_are_those_of_scipy(values: list[int]) -> None:
    assert ranks(np.array(values, float)) == pytest.approx(rankdata(values))
