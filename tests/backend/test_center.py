"""What TensorRT-RTX makes of centred probabilities: both products stay INT8, outside of the fused attention kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile.backend.audit import audit
from qcompile.ir.model import Model
from tests.passes.running import context, pipeline
from tests.tools.test_transplant import MODELS, images


@pytest.mark.rtx
def test_centred_probabilities_run_in_int8_but_not_fused(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    passes = "center{softmax},annotate{attention=all}"
    made, _ = pipeline(passes, Model.load(MODELS / "vit_digits.onnx"), {"input": images("calib", 8)}, context("rtx", "w8a8"))
    result = audit(made.save(tmp_path / "m.onnx"), "sm89")
    assert {n.reads for n in result.nodes if n.item.kind == "bmm"} == {"int8"} and not result.attention_fused
