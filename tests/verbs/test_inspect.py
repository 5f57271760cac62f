"""`qcompile inspect`: models with their planned and audited precision, and engines by their manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from qcompile.backend.manifest import sha256, write_manifest
from qcompile.errors import ModelError, UsageError
from qcompile.verbs.inspect import InspectOptions, inspect
from tests.cli.test_cli import call, document
from tests.target.graphs import AttentionForm, Form, attention, single

AUDIT: dict[str, Any] = {
    "gpu": "sm89", "label": "proxy: TensorRT-RTX", "version": "1", "share": 0.5, "coverage": 0.5,
    "attention_blocks": 0, "attention_fused_blocks": 0, "float_nodes": [], "kernels": [],
}  # fmt: skip


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "m.onnx"
    onnx.save(model, str(path))
    return path


def engine(folder: Path, **changes: Any) -> Path:
    """A file and a manifest as `qcompile build` writes them."""
    model = saved(single(Form()), folder)
    path = folder / "m.engine"
    path.write_bytes(b"ftrt" + bytes(60))
    audit = {**AUDIT, "planned_flops": 9, "total_flops": 10, "share": 1.0, "coverage": 0.9}
    manifest: dict[str, Any] = {
        "backend": "tensorrt_rtx", "version": "1.7", "target": "rtx",
        "compute_capabilities": ["sm89"], "flags": ["STRONGLY_TYPED"],
        "profiles": [{"shapes": {"x": [[1, 4], [2, 4], [3, 4]]}, "source": "given"}],
        "onnx": {"file": model.name, "sha256": sha256(model)}, "engine": {"sha256": sha256(path), "size": 64},
        "audit": {"sm89": audit},
    }  # fmt: skip
    write_manifest(path, manifest | changes)
    return path


def test_compute_nodes_say_what_they_read(tmp_path: Path) -> None:
    made = inspect(saved(single(Form()), tmp_path)).to_json()
    assert made["kind"] == "onnx" and made["audit"] is None
    (node,) = made["compute"]
    assert node["planned"] == "int8" and node["inputs"] == ["int8", "int8"] and node["reasons"] == [] and "audited" not in node


@pytest.mark.rtx
def test_planned_beside_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = saved(attention(AttentionForm(packed=True)), tmp_path)
    code, text, _ = call(capsys, "audit", path, "--gpu", "sm86", "--json")
    assert code == 0
    (tmp_path / "audit.json").write_text(text)
    made = inspect(path, InspectOptions(audit=tmp_path / "audit.json")).to_json()
    nodes = {n["node"]: n for n in made["compute"]}
    assert nodes["n_qkv"]["planned"] == "int8" and nodes["n_qkv"]["audited"] == "float" and nodes["n_qkv"]["kept"] is False
    assert made["compute"] == inspect(path, InspectOptions(gpu="sm86")).to_json()["compute"]
    fused = [n for n in made["compute"] if n["kernels"] == ["attention"]]
    assert len(fused) == 2 and {n["audited"] for n in fused} == {"int8"}
    code, text, _ = call(capsys, "inspect", path, "--gpu", "sm86")
    rows = [line for line in text.splitlines() if "n_qkv" in line and "MatMul" in line]
    assert code == 0 and "audited for sm86" in text and "float" in rows[0]


def test_remarks_say_why_a_node_is_float(tmp_path: Path) -> None:
    path = saved(single(Form()), tmp_path)
    node = inspect(path).to_json()["compute"][0]["node"]
    remark = {"kind": "missed", "pass": "annotate", "node": node, "reason": "a final head", "numbers": {}}
    remarks = tmp_path / "remarks.json"
    remarks.write_text(json.dumps({"remarks": [remark, {**remark, "kind": "applied", "reason": "no"}]}))
    assert inspect(path, InspectOptions(remarks=remarks)).to_json()["compute"][0]["reasons"] == ["annotate: a final head"]


@pytest.mark.parametrize(
    ("audit", "says"),
    [("{", "cannot read"), ("[]", "has no 'kernels'"), (json.dumps(AUDIT), "of another model")],
)
def test_a_wrong_audit(audit: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(audit)
    with pytest.raises(UsageError, match=says):
        inspect(saved(single(Form()), tmp_path), InspectOptions(audit=tmp_path / "a.json"))


def test_an_engine_by_its_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = engine(tmp_path)
    made = document(capsys, "inspect", path)
    assert made == document(capsys, "inspect", tmp_path / "m.engine.json")
    assert made["kind"] == "engine" and made["engine"]["matches"] and made["onnx"]["matches"]
    assert made["audits"]["sm89"]["coverage"] == 0.9 and made["compute_capabilities"] == ["sm89"]
    code, text, _ = call(capsys, "inspect", path)
    assert code == 0 and "x 1x4 2x4 3x4 (given)" in text and "90.0 %" in text


def test_an_engine_whose_files_are_not_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = engine(tmp_path)
    path.write_bytes(b"ftrt")
    (tmp_path / "m.onnx").unlink()
    made = inspect(path).to_json()
    assert made["engine"]["matches"] is False and made["onnx"]["matches"] is None
    text = call(capsys, "inspect", path)[1]
    assert "DIFFERS from the file here" in text and "the file is not here" in text
    with pytest.raises(UsageError, match="belong to an ONNX model"):
        inspect(path, InspectOptions(gpu="sm89"))


def test_engines_without_a_manifest(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.engine"
    foreign.write_bytes(b"ptrt" + bytes(10))
    with pytest.raises(ModelError, match=r"without a manifest \(foreign\.engine\.json\)"):
        inspect(foreign)
    manifest = tmp_path / "foreign.engine.json"
    for text in ("{", "{}", '{"engine": 3}', "[]"):
        manifest.write_text(text)
        with pytest.raises(ModelError, match="not the manifest of an engine"):
            inspect(manifest)
    with pytest.raises(ModelError, match="cannot read"):
        inspect(tmp_path / "none.json")
    with pytest.raises(ModelError, match="no model at"):
        inspect(tmp_path / "none.engine")
