"""Rules, builder and audit agree: every row of the behaviour matrix is built with TensorRT-RTX."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from qcompile.backend.audit import AuditResult, audit
from qcompile.backend.profile import parse_profile
from qcompile.errors import BackendError, UsageError
from tests.target.builds import Built, build_all, outcome
from tests.target.builds import audited as audited_items
from tests.target.graphs import AttentionForm, Form, attention, single
from tests.target.matrix import ATTENTION, SINGLE, AttentionRow, Row

FIGURES = {"share", "coverage", "planned_flops", "low_precision_flops", "total_flops", "attention_fused", "attention_blocks"}
KEYS = FIGURES | {"kernels", "schema_version", "label", "gpu", "version", "wasted_pairs", "float_nodes"}


@pytest.fixture(autouse=True)
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


def audited(model: onnx.ModelProto, folder: Path, gpu: str = "sm89") -> AuditResult:
    path = folder / "m.onnx"
    onnx.save(model, str(path))
    return audit(path, gpu)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """Every row of the matrix, built in one process (and a new one after each crash)."""
    done = build_all([(row.model(), row.gpu) for row in SINGLE], tmp_path_factory.mktemp("matrix"))
    return {row.name: b for row, b in zip(SINGLE, done, strict=True)}


@pytest.mark.rtx
@pytest.mark.parametrize("row", SINGLE, ids=lambda r: r.name)
def test_operator_rows(row: Row, built: dict[str, Built]) -> None:
    model = row.model()
    assert outcome(model, built[row.name]) == row.outcome, built[row.name].errors
    if row.outcome == "low":
        assert {n.reads for n in audited_items(model, built[row.name])} == {row.low}


@pytest.mark.rtx
@pytest.mark.parametrize("row", ATTENTION, ids=lambda r: r.name)
def test_attention_rows(row: AttentionRow, tmp_path: Path) -> None:
    result = audited(attention(row.form), tmp_path)
    products = [n for n in result.nodes if n.item.kind == "bmm"]
    assert result.attention_fused == float(row.fused)
    assert sum(n.reads == row.form.kind for n in products) == row.low


@pytest.mark.rtx
def test_json_and_flops(tmp_path: Path) -> None:
    result = audited(attention(AttentionForm(packed=True)), tmp_path, "sm86")
    doc = json.loads(json.dumps(result.to_json()))
    assert set(doc) >= KEYS
    assert doc["label"] == "proxy: TensorRT-RTX" and doc["gpu"] == "sm86"
    linear, products = 2 * 8 * 64 * 128 * 128, 2 * 8 * 4 * 64 * 64 * 32
    assert doc["total_flops"] == doc["planned_flops"] == 4 * linear + 2 * products
    assert doc["low_precision_flops"] == linear + 2 * products
    assert [n["node"] for n in doc["float_nodes"]] == ["n_qkv"]
    assert {(p["node"], p["rule"]) for p in doc["wasted_pairs"]} == {("n_qkv", "QC-TRT-018")}


@pytest.mark.rtx
def test_unnamed_nodes_and_static_shapes(tmp_path: Path) -> None:
    model = single(Form())
    for node in model.graph.node:
        node.name = ""
    result = audited(model, tmp_path)
    assert result.share == result.coverage == 1.0 and result.profile is None and result.attention_fused is None


@pytest.mark.rtx
def test_profile_decides_the_flops(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(attention(), str(path))
    small = audit(path, "sm89", parse_profile("x:1x64x128,2x64x128,4x64x128"))
    assert 4 * small.total_flops == audit(path, "sm89").total_flops
    with pytest.raises(UsageError, match="not an input"):
        audit(path, "sm89", parse_profile("z:1x64x128"))


@pytest.mark.rtx
def test_unknown_gpu(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"no target sm90; choose --gpu from sm75.*sm120"):
        audited(single(Form()), tmp_path, "sm90")
    with pytest.raises(UsageError, match="sm89"):
        audited(single(Form()), tmp_path, "ada")


def test_other_targets_have_no_audit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="use rtx"):
        audit(tmp_path / "m.onnx", target="ort")
