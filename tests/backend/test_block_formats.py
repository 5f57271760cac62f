"""What TensorRT-RTX makes of the emitted NVFP4 and MXFP8: 4-bit kernels for the one, float kernels for the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from qcompile.backend.audit import AuditResult, audit
from qcompile.errors import BackendError
from qcompile.ir.model import Model
from qcompile.verbs.build import make_engine
from tests.passes.models import built
from tests.passes.running import context, pipeline


@pytest.fixture(autouse=True)
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


def compiled(scheme: str, folder: Path, n: int = 48, trans_b: bool = False) -> Path:
    """One layer [N, 5, 64] -> [N, 5, n] (or a Gemm on [N, 64]) through the whole pipeline."""
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((n, 64) if trans_b else (64, n)) * 0.2).astype(np.float32)
    shape: list[Any] = ["N", 64] if trans_b else ["N", 5, 64]
    op: str = "Gemm" if trans_b else "MatMul"
    attributes: dict[str, Any] = {"transB": 1} if trans_b else {}
    float_model = built([helper.make_node(op, ["x", "w"], ["y"], name="fc", **attributes)], shape, {"w": w})
    x = rng.standard_normal((4, *[int(d) for d in shape[1:]])).astype(np.float32)
    model: Model = pipeline("", float_model, {"x": x}, context("rtx", scheme))[0]
    return model.save(folder / f"{scheme}.onnx")


def audited(path: Path) -> AuditResult:
    result = audit(path, "sm120")
    assert result.total_flops > 0 and not result.summary()["unsized_nodes"]
    return result


@pytest.mark.parametrize(("n", "trans_b"), [(48, False), (48, True), (65, False)])
def test_nvfp4_runs_in_4_bit(tmp_path: Path, n: int, trans_b: bool) -> None:
    result = audited(compiled("nvfp4", tmp_path, n, trans_b))
    assert (result.share, result.coverage) == (1.0, 1.0)
    assert {x.reads for x in result.nodes} == {"float4e2m1"}


def test_mxfp8_runs_in_float_and_the_audit_says_so(tmp_path: Path) -> None:
    result = audited(compiled("mxfp8", tmp_path))
    assert (result.share, result.coverage) == (0.0, 0.0)
    assert {p.rule for p in result.wasted_pairs} == {"QC-TRT-029"}


def test_fp4_for_an_older_gpu_fails_before_the_build(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="float4e2m1 needs sm120 or newer, sm89"):
        make_engine(compiled("nvfp4", tmp_path), tmp_path / "m.engine", target="rtx", gpus=["sm89"])
    assert not (tmp_path / "m.engine").exists()
