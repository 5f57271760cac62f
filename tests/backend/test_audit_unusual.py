"""Whatever TensorRT-RTX builds is audited: the engine never falls to a line of the dump, or to a name."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from qcompile.backend import audit as audits
from qcompile.backend.audit import audit
from qcompile.backend.dump import Dump
from qcompile.cli.audit import audit_lines
from qcompile.report import Silent
from qcompile.verbs.build import EngineBuildOptions, build
from tests.backend.unusual import UNUSUAL, branches, loop, named, recurrent

NAMES = ("block\n[fc] 1, 2", "a\x1fb", "a\x1eb", "\x1b[31mred", "größer", "x, LayerType: gemm, Inputs: []", "a_b", "/q/MatMul[0]")


@pytest.fixture(autouse=True)
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, str(folder / "m.onnx"))
    return folder / "m.onnx"


@pytest.mark.rtx
@pytest.mark.parametrize("name", UNUSUAL)
def test_every_line_is_read(name: str, tmp_path: Path) -> None:
    result = audit(saved(UNUSUAL[name](), tmp_path))
    assert result.unread == 0 and not result.blind
    assert all(n.kernels for n in result.nodes if n.item.kind != "recurrent")


@pytest.mark.rtx
def test_recurrent_layers_are_work_in_float(tmp_path: Path) -> None:
    result = audit(saved(recurrent(), tmp_path))
    assert [(n.item.kind, n.flops) for n in result.nodes] == [
        ("recurrent", 2 * 12 * 8 * 4 * 32 * (64 + 32)),
        ("gemm", 2 * 8 * 32 * 64),
    ]
    assert result.notes == ()


@pytest.mark.rtx
def test_bodies_are_left_out_and_said_to_be(tmp_path: Path) -> None:
    assert audit(saved(branches(), tmp_path)).notes == ("the figures leave out 4 products in bodies of If, Loop and Scan",)
    result = audit(saved(loop("last"), tmp_path))  # named as a node of the main graph
    assert [len(n.kernels) for n in result.nodes] == [1, 1]
    assert result.notes[0] == "the figures leave out what has no known size: last, all"


@pytest.mark.rtx
def test_any_name(tmp_path: Path) -> None:
    result = audit(saved(named(*NAMES), tmp_path))
    assert [n.item.node for n in result.nodes] == list(NAMES)
    assert [len(n.kernels) for n in result.nodes] == [1] * len(NAMES)


@pytest.mark.rtx
def test_a_dump_of_another_form_costs_the_figures_not_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audits, "parse_dump", lambda text, names: Dump((), 7))
    monkeypatch.setattr(audits, "TESTED", ("1.0",))
    model, engine = saved(recurrent(), tmp_path), tmp_path / "m.engine"
    made = build(model, EngineBuildOptions(output=engine, target="rtx"), Silent())
    assert engine.is_file() and made.audits[0].coverage is None
    said = audit_lines(made.audits[0])
    assert len(said) == 2 and "7 of 7 lines" in said[1]
    assert said[1].endswith("nothing is known of the kernels; the audit was tested with 1.0: install tensorrt-rtx==1.0")
