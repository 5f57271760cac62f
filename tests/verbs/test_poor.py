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


DEPTHWISE = """<ir_version: 9, opset_import: ["" : 17]> g (float[N,8,6,6] x) => (float[N,8,6,6] y) {
  [gain] a = Mul(x, gains)
  [act] b = HardSwish(a)
  [depthwise] c = Conv<group = 8, pads = [1, 1, 1, 1]>(b, w)
  [mix] y = Conv(c, v)
}"""


def test_unlike_channels_in_front_of_a_depthwise_convolution_are_equalized(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    gains = 4.0 ** np.arange(8).reshape(8, 1, 1)
    held = {"w": rng.standard_normal((8, 1, 3, 3)) / gains[..., None], "v": rng.standard_normal((8, 8, 1, 1)), "gains": gains}
    proto = parser.parse_model(DEPTHWISE)
    proto.graph.initializer.extend(numpy_helper.from_array(a.astype(np.float32), n) for n, a in held.items())
    onnx.save(proto, tmp_path / "m.onnx")
    np.savez(tmp_path / "m.calib.npz", x=rng.standard_normal((32, 8, 6, 6)).astype(np.float32))
    words = [str(tmp_path / "m.onnx"), "--target", "trt", "--quantize", "*", "-o", str(tmp_path / "q.onnx")]
    assert main(words) == 0
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if "poor result" in line]
    command = shlex.split(warning.rpartition("try: ")[2])
    assert command[command.index("--passes") + 1].startswith("equalize,") and "--keep-float" not in command
    assert main(command[1:]) == 0
    assert "poor result" not in capfd.readouterr().err


def test_a_good_result_is_not_called_poor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cnn = Path(__file__).parents[2] / "models" / "digits_cnn.onnx"
    assert main([str(cnn), "--target", "ort", "--samples", "8", "-o", str(tmp_path / "q.onnx")]) == 0
    assert "poor result" not in capsys.readouterr().err


def test_every_scheme_has_a_bar() -> None:
    assert {*BARS} == {*SCHEMES}
