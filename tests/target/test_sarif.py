"""SARIF 2.1.0: the properties that the standard requires, checked by hand (the published schema is not needed)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from qcompile.cli import main
from qcompile.target.catalog import TARGETS
from qcompile.verbs.check import check_file, write_sarif
from tests.target.graphs import single
from tests.target.matrix import CONV

LEVELS = {"none", "note", "warning", "error"}


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "a model.onnx"
    model = single(CONV.but(zero_point=3, opset=13))
    model.graph.node[0].name = ""
    onnx.save(model, str(path))
    return path


def require(document: dict[str, Any]) -> None:
    """SARIF 2.1.0 sections 3.13, 3.14, 3.18, 3.19, 3.27, 3.49: required properties and index consistency."""
    assert document["version"] == "2.1.0" and document["$schema"].endswith("sarif-2.1.0.json")
    for run in document["runs"]:
        driver = run["tool"]["driver"]
        assert driver["name"] and driver["version"]
        ids = [rule["id"] for rule in driver["rules"]]
        assert len(set(ids)) == len(ids)
        for rule in driver["rules"]:
            assert rule["shortDescription"]["text"] and rule["fullDescription"]["text"] and rule["help"]["text"]
            assert rule["defaultConfiguration"]["level"] in LEVELS
        for result in run["results"]:
            assert result["message"]["text"] and result["level"] in LEVELS
            assert ids[result["ruleIndex"]] == result["ruleId"]
            for location in result["locations"]:
                artifact = location["physicalLocation"]["artifactLocation"]
                assert run["artifacts"][artifact["index"]]["location"]["uri"] == artifact["uri"]
                assert " " not in artifact["uri"] and not artifact["uri"].startswith("/")
                assert all(x["name"] for x in location.get("logicalLocations", []))


def test_document(broken: Path, tmp_path: Path) -> None:
    checked = check_file(broken, "rtx", ["sm89"])
    write_sarif(checked, broken, tmp_path / "out.sarif")
    document = json.loads((tmp_path / "out.sarif").read_text())
    require(document)
    run = document["runs"][0]
    assert len(run["tool"]["driver"]["rules"]) == len(TARGETS["rtx"].rules)
    found = [(r["ruleId"], r["level"]) for r in run["results"]]
    assert ("QC-TRT-001", "error") in found and ("QC-TRT-016", "warning") in found
    located = next(r for r in run["results"] if r["ruleId"] == "QC-TRT-001" and "logicalLocations" in r["locations"][0])
    assert located["locations"][0]["logicalLocations"][0]["name"] == "n_x_dq"
    assert run["artifacts"][0]["location"]["uri"] == "a%20model.onnx"


def test_clean_model_has_no_results(tmp_path: Path) -> None:
    onnx.save(single(CONV), str(tmp_path / "m.onnx"))
    document = check_file(tmp_path / "m.onnx", "rtx").to_sarif("m.onnx")
    require(document)
    assert document["runs"][0]["results"] == []


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_on_standard_output(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "check", broken, "--target", "rtx", "--sarif", "-")
    require(json.loads(out))
    assert code == 1
    code, _, err = call(capsys, "check", broken, "--sarif", "-", "--json")
    assert code == 2 and "give --sarif a file" in err


def test_fix_on_the_command_line(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, fixed = broken.read_bytes(), tmp_path / "fixed.onnx"
    code, out, _ = call(capsys, "check", broken, "--target", "rtx", "--fix", "-o", fixed)
    assert code == 0 and "fixed QC-TRT-001 zero point" in out and "0 errors, 0 warnings" in out
    assert broken.read_bytes() == before and call(capsys, "check", fixed, "--target", "rtx")[0] == 0
    code, out, _ = call(
        capsys, "check", broken, "--target", "rtx", "--fix", "-o", fixed, "--json", "--sarif", tmp_path / "x.sarif"
    )
    made = json.loads(out)
    assert not made["errors"] and {f["rule"] for f in made["fixed"]} >= {"QC-TRT-001", "QC-TRT-016", "QC-TRT-017"}
    require(json.loads((tmp_path / "x.sarif").read_text()))


def test_what_cannot_be_fixed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(single(CONV.but(scale=-1.0)), str(tmp_path / "m.onnx"))
    code, out, _ = call(capsys, "check", tmp_path / "m.onnx", "--target", "rtx", "--fix", "-o", tmp_path / "n.onnx")
    assert code == 1 and "not fixed: this needs a decision of yours" in out


def test_the_input_is_never_overwritten(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "check", broken, "--fix", "-o", broken)
    assert code == 2 and "never overwritten" in err
    code, _, err = call(capsys, "check", broken, "--fix")
    assert code == 2 and "-o FIXED.onnx" in err
    code, _, err = call(capsys, "check", broken, "-o", tmp_path / "x.onnx")
    assert code == 2 and "--fix" in err
    code, _, err = call(capsys, "check", broken, "--fix", "-o", tmp_path / "no" / "x.onnx")
    assert code == 3 and "cannot write" in err and not (tmp_path / "no").exists()
