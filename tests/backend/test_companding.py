"""What TensorRT-RTX makes of companded codes: both twin products are INT8, powers of two reach an FP8 product."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile.backend.audit import AuditResult, audit
from qcompile.ir.model import Model
from tests.passes.running import context, pipeline
from tests.tools.test_transplant import MODELS, images


@pytest.fixture(autouse=True)
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


def audited(passes: str, scheme: str, folder: Path) -> AuditResult:
    source = Model.load(MODELS / "vit_digits.onnx")
    made, _ = pipeline(passes, source, {"input": images("calib", 8)}, context("rtx", scheme))
    return audit(made.save(folder / "m.onnx"), "sm89")


@pytest.mark.rtx
def test_both_branches_run_in_int8(tmp_path: Path) -> None:
    result = audited("split-range{softmax},annotate{attention=all}", "w8a8", tmp_path)
    reads = {n.item.node: n.reads for n in result.nodes if n.item.node.endswith(("_first", "_second"))}
    assert len(reads) == 24 and set(reads.values()) == {"int8"}


@pytest.mark.rtx
def test_powers_of_two_reach_an_fp8_product_outside_the_fused_kernel(tmp_path: Path) -> None:
    result = audited("annotate{attention=all},log2-softmax{deploy=fp8}", "fp8", tmp_path)
    products = [n.reads for n in result.nodes if n.item.kind == "bmm"]
    assert set(products) == {"float8e4m3fn"} and not result.attention_fused
