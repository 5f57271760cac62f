"""smooth{search}: an alpha is taken for what it brings on rows that it was not fitted to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper

from qcompile.calib.observe import MinMax, MinMaxStat, Rows, RowsStat
from qcompile.ir.model import Model
from qcompile.passes.equivalent.smooth import SmoothQuant, best_alpha, largest_of_rows, ratios
from qcompile.quant.qtype import INT8
from qcompile.quant.spec import QuantSpec
from qcompile.report import Remark
from qcompile.rewrite.held_out import Fit, Half, Judge, Types
from tests.passes.measures import constants_of, outputs, sqnr_db
from tests.passes.models import built
from tests.passes.running import context, pipeline

node = helper.make_node
INPUTS, HIDDEN, FEW = 32, 96, 32
TYPES = Types(QuantSpec(INT8), INT8)


def rare() -> Model:
    """An MLP whose hidden channels are seldom active: their largest values are not among FEW samples."""
    rng = np.random.default_rng(0)
    held = {"w1": rng.standard_normal((INPUTS, HIDDEN)), "c1": np.full(HIDDEN, -4.0), "w2": rng.standard_normal((HIDDEN, 16))}
    nodes = [
        node("Gemm", ["x", "w1", "c1"], ["z"], name="fc1"),
        node("Relu", ["z"], ["h"], name="act"),
        node("Gemm", ["h", "w2"], ["y"], name="fc2"),
    ]
    return built(nodes, ["N", INPUTS], {n: a.astype(np.float32) for n, a in held.items()})


def uneven() -> Model:
    """The same MLP with hidden channels of very different and stable sizes."""
    model, spread = rare(), np.exp(np.random.default_rng(1).standard_normal(HIDDEN) * 1.5).astype(np.float32)
    held = constants_of(model)
    nodes = list(model.to_proto().graph.node)
    return built(nodes, ["N", INPUTS], {"w1": held["w1"] * spread, "c1": 2 * spread, "w2": held["w2"] / np.sqrt(spread)[:, None]})


def arrays(samples: int, seed: int) -> dict[str, NDArray[Any]]:
    return {"x": np.random.default_rng(seed).standard_normal((samples, INPUTS)).astype(np.float32)}


def hidden(model: Model, samples: int, seed: int = 0) -> tuple[MinMaxStat, RowsStat, NDArray[np.float64]]:
    """What the pass measures in front of fc2, and fc2's weight."""
    held, x = constants_of(model), arrays(samples, seed)["x"]
    h = np.maximum(x @ held["w1"] + held["c1"], 0)
    return MinMax(-1).observe(h), Rows(512).observe(h), held["w2"].astype(np.float64)


def found(parts: list[Half], weight: NDArray[np.float64]) -> tuple[float, float]:
    none = np.zeros(len(weight))

    def fit(alpha: float) -> Fit:
        return lambda half: (none, ratios(half.extremes, none, largest_of_rows(weight), alpha))

    return best_alpha(Judge(parts, weight, TYPES), fit, None)


def quality(passes: str, model: Model, calibrated: int) -> tuple[float, list[Remark]]:
    """SQNR in dB on new samples."""
    ctx, new = context("trt", quantize=("fc2",)), arrays(400, 99)
    ctx.target = replace(ctx.target, half_body=False)
    made, reports = pipeline(passes, model, arrays(calibrated, 0), ctx)
    return sqnr_db(outputs(model, new)[0], outputs(made, new)[0]), [
        r for x in reports for r in x.remarks if r.pass_name == "smooth"
    ]


def test_a_search_on_the_fitted_rows_overfits_and_halves_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    stat, rows, weight = hidden(rare(), FEW)
    alpha, gain = found([Half(rows.rows, rows, stat)], weight)
    assert alpha > 0 and gain > 1.0, "on the rows that made the ratios, smoothing looks good"
    plain = quality("", rare(), FEW)[0]
    for passes in ("smooth{search}", f"smooth{{alpha={alpha}}}"):
        kept, (remark,) = quality(passes, rare(), FEW)
        assert kept == plain and remark.kind == "missed" and remark.node == "fc2" and "held-out" in remark.reason
    monkeypatch.setattr(SmoothQuant, "_best", lambda *_: (alpha, gain))
    assert quality("smooth", rare(), FEW)[0] < plain - 1.0, "dB: on new rows it is not"


@pytest.mark.parametrize("samples", [32, 256])
def test_channels_that_stay_uneven_are_smoothed(samples: int) -> None:
    smoothed, (remark,) = quality("smooth{search}", uneven(), samples)
    assert remark.kind == "applied" and float(remark.numbers["alpha"]) > 0
    assert smoothed > quality("", uneven(), samples)[0] + 3.0


def test_too_few_rows_to_judge_by_is_said() -> None:
    kept, (remark,) = quality("smooth", uneven(), 24)
    assert kept == quality("", uneven(), 24)[0] and "too few rows" in remark.reason
