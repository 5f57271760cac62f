"""Mistakes that other tools were caught with, and the pitfalls of ONNX Runtime: one test each, named after the trap."""

from __future__ import annotations

import tracemalloc

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from qcompile.calib.observe import Histogram, Probe
from qcompile.calib.sweep.sweep import sweep
from qcompile.decide.decisions import decisions
from qcompile.execute.session import session_options
from qcompile.ir.model import Model
from qcompile.pipeline import registry
from tests.passes.measures import op_types, outputs, relative_error, run_fused, sqnr_db
from tests.passes.models import built, fixture, fixture_arrays, linear, stem
from tests.passes.running import context, dataset, fixture_step, pipeline, run_passes

node = helper.make_node


RNG = np.random.default_rng(0)


def random(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def lowered(name: str, target: str, scheme: str = "w8a8", passes: str = "") -> Model:
    return pipeline(passes, fixture(name), fixture_arrays(name), context(target, scheme))[0]


@pytest.mark.parametrize("target", ["trt", "ort"])
def test_trap_1_relu_is_not_deleted_in_front_of_a_signed_quantizer(target: str) -> None:
    arrays = fixture_arrays("stem")
    model, _ = pipeline("", stem(), arrays, context(target))
    signed = {str(n.inputs[2].const_value.dtype) for n in model.graph if n.op_type == "QuantizeLinear"}  # type: ignore[union-attr]
    assert "Relu" in op_types(model) or signed == {"UINT8"}
    assert sqnr_db(outputs(stem(), arrays)[0], outputs(model, arrays)[0]) > 20


@pytest.mark.parametrize("passes", ["smooth{always}", "repq{always}"])
@pytest.mark.parametrize("name", ["timm_vit_shared_ts17", "timm_vit_shared_dy18", "hf_bert_shared_ts14"])
def test_trap_2_shared_norm_constants_are_copied_on_write(name: str, passes: str) -> None:
    done, arrays = fixture_step(name, passes, "trt"), fixture_arrays(name, seed=3)
    if name == "timm_vit_shared_dy18":
        gammas = [n.inputs[1] for n in fixture(name).graph if n.op_type == "LayerNormalization"]
        assert len({v.name for v in gammas if v is not None}) < len(gammas), "the exporter shares them"
    if "vit" in name:
        assert done.changed
    assert relative_error(outputs(done.before, arrays), outputs(done.after, arrays)) <= 5e-6


@pytest.mark.parametrize("passes", ["smooth{always}", "repq{always}", "smooth{shift always}"])
def test_trap_3_applied_means_that_the_sites_constants_changed(passes: str) -> None:
    done = fixture_step("timm_vit_shared_ts17", passes, "trt")
    applied = [r.node for r in done.report.remarks if r.kind == "applied" and r.reason.startswith("norm site")]
    assert applied
    before, after = ({n.name: n for n in m.graph} for m in (done.before, done.after))
    for name in applied:
        old, new = (g[name].inputs[1] for g in (before, after))
        assert not np.array_equal(old.const_value.numpy(), new.const_value.numpy()), name  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_trap_4_a_histogram_is_no_slow_minmax(method: str) -> None:
    x = random(2048, 5, 16)
    x[7, 0, 0] = 20.0
    wide, tight = (_activation_scale(f"annotate{{range={m}}}", x) for m in ("minmax", method))
    assert tight < 0.9 * wide


def _activation_scale(spec: str, x: NDArray[np.float32]) -> float:
    model, _ = run_passes(linear(), registry.parse(f"canonicalize,{spec}"), {"x": x}, context("trt"))
    params = next(d.qparams for _, slot, d in decisions(model.graph) if slot == 0)
    assert params is not None
    return float(params.scale)


@pytest.mark.parametrize("target", ["trt", "rtx"])
def test_trap_5_tensorrt_gets_signed_codes_with_zero_point_zero(target: str) -> None:
    model = lowered("timm_vit_shared_ts17", target)
    pairs = [n for n in model.graph if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for n in pairs:
        zero = n.inputs[2].const_value.numpy() if len(n.inputs) > 2 and n.inputs[2] is not None else np.int8(0)  # type: ignore[union-attr]
        assert zero.dtype == np.int8 and not np.any(zero)


@pytest.mark.parametrize("target", ["trt", "ort"])
@pytest.mark.parametrize("name", ["hf_bert_shared_ts14", "timm_swin_padded_dy18"])
def test_trap_6_scores_and_masks_stay_in_float(name: str, target: str) -> None:
    model = lowered(name, target)
    assert "DequantizeLinear" in op_types(model)
    for softmax in (n for n in model.graph if n.op_type == "Softmax"):
        value = softmax.inputs[0]
        for _ in range(8):
            producer = value.producer() if value is not None else None
            if producer is None or producer.op_type == "MatMul":
                break
            assert producer.op_type != "DequantizeLinear"
            assert all(v is None or (p := v.producer()) is None or p.op_type != "DequantizeLinear" for v in producer.inputs)
            value = producer.inputs[0]


@pytest.mark.parametrize("target", ["trt", "ort"])
def test_trap_7_value_infos_and_the_users_names_stay_true(target: str) -> None:
    source = fixture("timm_vit_shared_ts17")
    kept = next(n.name for n in source.graph if n.op_type == "MatMul" and "fc1" in str(n.name))
    ctx = context(target, keep_float=(str(kept),))
    model, reports = pipeline("repq,smooth", source, fixture_arrays("timm_vit_shared_ts17"), ctx)
    proto = model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    found = next(n for n in model.graph if n.name == kept)
    assert "DequantizeLinear" not in [p.op_type for v in found.inputs if v is not None and (p := v.producer()) is not None]
    assert any(r.kind == "missed" and r.node == kept and "--keep-float" in r.reason for x in reports for r in x.remarks)


def test_trap_8_calibration_memory_does_not_grow_with_the_samples() -> None:
    peaks = [_peak(n) for n in (32, 32, 512)]
    assert peaks[2] < peaks[1] + 1_000_000, "512 samples of the probed tensor alone are 10 MB"


def _peak(samples: int) -> int:
    data = dataset({"x": np.zeros((samples, 5, 16), np.float32) + random(1, 5, 16)})
    wide = built([node("MatMul", ["x", "w"], ["y"], name="fc")], ["N", 5, 16], {"w": random(16, 1024)})
    tracemalloc.start()
    sweep(wide, data, [Probe("y", Histogram())], threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("passes", ["", "opset{version=21}"])
@pytest.mark.parametrize("target", ["ort", "rtx"])
def test_static_models_load_at_full_optimization(target: str, passes: str) -> None:
    """ONNX Runtime 1.31 cannot load int8 Q/DQ + 3-D MatMul + Add at opset 21."""
    arrays = fixture_arrays("timm_vit_ts14")
    model = lowered("timm_vit_ts14", target, passes=passes)
    got = run_fused(model, {n: a[:2] for n, a in arrays.items()}, qdq_fusion=target == "ort")
    assert sqnr_db(outputs(fixture("timm_vit_ts14"), arrays)[0][:2], got) > 15


def test_weight_only_products_are_computed_in_float() -> None:
    """Without the session entry, ONNX Runtime quantizes their activations to int8 behind one's back."""
    assert session_options().get_session_config_entry("session.qdq_matmulnbits_accuracy_level") == "1"
    model = built([node("MatMul", ["x", "w"], ["y"], name="fc")], ["N", 5, 128], {"w": random(128, 64)})
    arrays = {"x": random(4, 5, 128)}
    done, _ = pipeline("", model, arrays, context("ort", "w4a16"))
    assert "DequantizeLinear" in op_types(done) and "QuantizeLinear" not in op_types(done)
    assert relative_error(outputs(done, arrays), [run_fused(done, arrays)]) < 1e-5


def test_a_large_half_precision_bias_does_not_overflow() -> None:
    """ONNX Runtime computes round(c / (s_x s_w)) in float16 between a quantized Conv and a QuantizeLinear."""
    constants = {"w1": random(8, 4, 3, 3) * 1e-3, "b1": np.full(8, 3.0, np.float32), "w2": random(8, 8, 3, 3), "b2": random(8)}
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["h"], name="conv1"),
        node("Relu", ["h"], ["r"], name="relu"),
        node("Conv", ["r", "w2", "b2"], ["y"], name="conv2"),
    ]
    model = built(nodes, ["N", 4, 8, 8], constants)
    arrays = {"x": random(8, 4, 8, 8) * 0.1}
    done, _ = pipeline("", model, arrays, context("trt"))
    reference = outputs(model, arrays)[0]
    for got in (outputs(done, arrays)[0], run_fused(done, arrays)):
        assert np.isfinite(got).all() and sqnr_db(reference, got) > 25
