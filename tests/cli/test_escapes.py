"""A name in a model may hold anything; what is printed of it obeys no one."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from qcompile.cli.app import main
from qcompile.ir.model import Model
from qcompile.ir.text import print_model
from qcompile.report import escaped
from tests.backend.unusual import named

HOSTILE = ("a\x1b[31m", "b\nerror: all is lost", "c\x9b2J\u202e")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("größer /q/MatMul[0]", "größer /q/MatMul[0]"), ("a\x1b[2J", r"a\x1b[2J"), ("a\nb\t", r"a\nb\t"), ("\u202eb", r"\u202eb")],
)
def test_escaped(text: str, shown: str) -> None:
    assert escaped(text) == shown and escaped("a\nb", keep="\n") == "a\nb"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(named(*HOSTILE), str(tmp_path / "m.onnx"))
    return tmp_path / "m.onnx"


@pytest.mark.parametrize(
    "command",
    [
        ["check", "MODEL", "--target", "rtx"],
        ["inspect", "MODEL"],
        ["eval", "MODEL", "MODEL", "--data", "random", "--per-layer"],
        [
            "MODEL",
            "--calib",
            "random",
            "--target",
            "ort",
            "--samples",
            "4",
            "--passes",
            "none",
            "--print-after",
            "--keep-float",
            "a*",
        ],
        ["MODEL", "--calib", "random", "--keep-float", "\x1b[2J"],
    ],
)
def test_nothing_that_a_terminal_obeys(
    command: list[str], model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)  # where outputs go
    main([str(model) if word == "MODEL" else word for word in command])
    out, err = capsys.readouterr()
    assert not set(out + err) & set("\x1b\x9b\u202e")
    assert not any(line.startswith("error: all") for line in (out + err).splitlines())


def test_a_graph_is_one_line_a_node(model: Path) -> None:
    lines = print_model(Model.load(model)).splitlines()
    assert len(lines) == 1 + len(HOSTILE) and lines[2].endswith(r"@b\nerror: all is lost")


@pytest.mark.rtx
def test_audit(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert main(["audit", str(model)]) == 0
    out = capsys.readouterr().out
    assert r"a\x1b[31m" in out and "\x1b" not in out
