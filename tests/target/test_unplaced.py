"""What no placement looks at is told: recurrent layers, and products in bodies."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import ModelProto

from qcompile.ir.model import Model
from qcompile.ir.select import Selection
from qcompile.quant.spec import SCHEMES
from qcompile.target.catalog import TARGETS
from qcompile.target.target import Choices
from tests.backend.unusual import branches, loop, recurrent


def missed(model: ModelProto, folder: Path, target: str = "rtx", scheme: str = "w8a8") -> list[tuple[str, str]]:
    onnx.save(model, str(folder / "m.onnx"))
    return TARGETS[target].place(Model.load(folder / "m.onnx"), SCHEMES[scheme], Selection(), Choices()).missed


@pytest.mark.parametrize("target", ["rtx", "trt", "ort", "openvino"])
@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers(op: str, gates: int, target: str, tmp_path: Path) -> None:
    reason = f"a recurrent layer: {target} has no low-precision kernel for {op}, so it stays in float"
    if (target, op) == ("ort", "LSTM"):
        reason = "a recurrent layer: float, unless insert-qdq{lstm=dynamic} as the last pass has it in 8 bit, ranges of run time"
    assert (op, reason) in missed(recurrent(op, gates), tmp_path, target)


def test_bodies(tmp_path: Path) -> None:
    assert ("if", "bodies of If are not quantized: its 4 products stay in float") in missed(branches(), tmp_path)
    assert ("loop", "bodies of Loop are not quantized: its 1 products stay in float") in missed(loop(), tmp_path, "ort")


def test_nothing_is_said_where_nothing_is_quantized(tmp_path: Path) -> None:
    assert missed(recurrent(), tmp_path, scheme="fp16") == []
