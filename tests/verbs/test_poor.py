"""A poor result is said, with the sites that cost most and the next command."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from qcompile.cli import main
from qcompile.ir.select import exactly
from qcompile.quant.spec import SCHEMES
from qcompile.verbs.compile.poor import BARS

TEXT = """<ir_version: 9, opset_import: ["" : 17]> g (float[N,16] x) => (float[N,16] y) {
  [good] a = MatMul(x, w)
  [act] b = Relu(a)
  [spread] c = Mul(b, gains)
  [bad] y = MatMul(c, v)
}"""


@pytest.fixture
def model(tmp_path: Path, bad: str) -> Path:
    """The input of `bad` has one channel 3,000 times larger than the others, and weights that give all the same say."""
    rng = np.random.default_rng(0)
    gains = np.ones(16, np.float32)
    gains[3] = 3000
    held = {"w": rng.standard_normal((16, 16)), "v": rng.standard_normal((16, 16)) / gains[:, None], "gains": gains}
    proto = parser.parse_model(TEXT)
    proto.graph.node[-1].name = bad
    proto.graph.initializer.extend(numpy_helper.from_array(a.astype(np.float32), n) for n, a in held.items())
    onnx.save(proto, tmp_path / "m.onnx")
    np.savez(tmp_path / "m.calib.npz", x=rng.standard_normal((64, 16)).astype(np.float32))
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("bad", ["bad", "blocks[3]/op:bad*"])
def test_it_names_the_site_and_the_command_that_helps(model: Path, bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = model.with_name("q.onnx")
    words = [str(model), "--target", "ort", "--passes", "", "--quantize", "*", "-o", str(out)]
    assert main(words) == 0
    printed = capsys.readouterr()
    (warning,) = [line for line in printed.err.splitlines() if "poor result" in line]
    assert "output 'y' stands at" in warning and "below the 20 dB that w8a8 should reach" in warning
    assert f"most error enters at {bad} (" in warning and "poor result" in printed.out
    command = shlex.split(warning.rpartition("try: ")[2])
    assert command[:2] == ["qcompile", str(model)] and command.count("--keep-float") >= 1 and exactly(bad) in command
    assert main(command[1:]) == 0
    assert "poor result" not in capsys.readouterr().err


def test_a_good_result_is_not_called_poor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cnn = Path(__file__).parents[2] / "models" / "digits_cnn.onnx"
    assert main([str(cnn), "--target", "ort", "--samples", "8", "-o", str(tmp_path / "q.onnx")]) == 0
    assert "poor result" not in capsys.readouterr().err


def test_every_scheme_has_a_bar() -> None:
    assert {*BARS} == {*SCHEMES}
