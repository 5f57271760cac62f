from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper

from qcompile.pipeline import registry
from tests.passes.measures import outputs, run_fused, sqnr_db
from tests.passes.models import built
from tests.passes.running import context, pipeline, run_passes

node = helper.make_node


RNG = np.random.default_rng(0)


def random(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def test_trap_9_fitting_a_small_layer_takes_no_seconds() -> None:
    model = built([node("MatMul", ["x", "w"], ["y"], name="fc")], ["N", 5, 192], {"w": random(192, 768)})
    arrays = {"x": random(16, 5, 192)}
    ctx = context("trt", "w4a8")
    ready, _ = run_passes(model, registry.parse("canonicalize,annotate"), arrays, ctx)
    start = time.process_time()
    run_passes(ready, registry.parse("rtn"), arrays, ctx)
    assert time.process_time() - start < 5.0


@pytest.mark.parametrize("target", ["trt", "ort"])
def test_trap_10_weights_are_quantized_per_channel(target: str) -> None:
    """A convolution whose channels differ by 1000 times keeps its small ones."""
    weight = random(8, 4, 3, 3) * np.logspace(0, -3, 8, dtype=np.float32)[:, None, None, None]
    model = built(
        [node("Conv", ["x", "w", "b"], ["y"], name="conv")], ["N", 4, 8, 8], {"w": weight, "b": np.zeros(8, np.float32)}
    )
    arrays = {"x": random(8, 4, 8, 8)}
    ctx = context(target)
    ctx.target = replace(ctx.target, half_body=False)
    done, _ = pipeline("", model, arrays, ctx)
    a, b = outputs(model, arrays)[0], outputs(done, arrays)[0]
    assert min(sqnr_db(a[:, c], b[:, c]) for c in range(8)) > 25


def test_the_bias_of_a_dead_channel_does_not_overflow_int32() -> None:
    """c / (s_x s_w) must fit: a channel without weights would give ONNX Runtime a bias of 2^31 and more."""
    weight = random(8, 4, 3, 3)
    weight[3] *= 1e-13
    constants = {"w": weight, "b": np.full(8, 2.0, np.float32), "w2": random(8, 8, 1, 1), "b2": random(8)}
    nodes = [node("Conv", ["x", "w", "b"], ["h"], name="conv"), node("Conv", ["h", "w2", "b2"], ["y"], name="next")]
    model = built(nodes, ["N", 4, 8, 8], constants)
    arrays = {"x": random(8, 4, 8, 8)}
    done, reports = pipeline("", model, arrays, context("ort"))
    assert any(r.pass_name == "rtn" and "dead channels" in r.reason for x in reports for r in x.remarks)
    assert sqnr_db(outputs(model, arrays)[0], run_fused(done, arrays)) > 20  # 21 to 36 dB by the draw; an overflow leaves none
