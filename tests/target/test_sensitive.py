"""Filters and bands in front of a logarithm stay float; layers with an activation in between do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from qcompile.ir.model import Model
from qcompile.quant.spec import SCHEMES
from qcompile.target.catalog import TARGETS
from qcompile.target.sensitive import SPECTRUM, log_spectra
from qcompile.target.target import Choices
from tests.passes.models import built
from tests.passes.running import context

node = helper.make_node


def sound(between: list[Any]) -> Model:
    """Two filters, squares, mel bands, what stands `between` ("mel" to "shown"), a logarithm, and layers behind it."""
    rng = np.random.default_rng(0)
    weights = {
        **{name: rng.standard_normal((16, 4, 1, 9)).astype(np.float32) for name in ("real_w", "imaginary_w")},
        "mel_w": rng.random((56, 16)).astype(np.float32),
        "after_w": rng.standard_normal((16, 16, 1, 3)).astype(np.float32),
        "last_w": rng.standard_normal((16, 16, 1, 3)).astype(np.float32),
        "floor": np.array(1e-6, np.float32),
    }
    nodes = [
        node("Conv", ["x", "real_w"], ["re"], name="real"),
        node("Conv", ["x", "imaginary_w"], ["im"], name="imaginary"),
        node("Mul", ["re", "re"], ["re2"]),
        node("Mul", ["im", "im"], ["im2"]),
        node("Add", ["re2", "im2"], ["power"]),
        node("Sqrt", ["power"], ["size"]),
        node("MatMul", ["size", "mel_w"], ["mel"], name="mel"),
        *between,
        node("Max", ["shown", "floor"], ["positive"]),
        node("Log", ["positive"], ["log"]),
        node("Conv", ["log", "after_w"], ["after"], name="after"),
        node("Relu", ["after"], ["active"]),
        node("Conv", ["active", "last_w"], ["last"], name="last"),
        node("Relu", ["last"], ["y"]),
    ]
    return built(nodes, [1, 4, 1, 64], weights)


PLAIN, HIDDEN = [node("Transpose", ["mel"], ["shown"], perm=[0, 1, 2, 3])], [node("Softplus", ["mel"], ["shown"])]


def test_what_leads_to_a_logarithm() -> None:
    assert {str(n.name) for n in log_spectra(sound(PLAIN).graph)} == {"real", "imaginary", "mel"}
    assert not log_spectra(sound(HIDDEN).graph)


@pytest.mark.parametrize("target", ["ort", "rtx", "openvino"])
def test_they_stay_float_and_say_why(target: str) -> None:
    placed = TARGETS[target].place(sound(PLAIN), SCHEMES["w8a8"], context(target).selection, Choices("auto", "auto", "float"))
    assert {n for n, reason in placed.missed if SPECTRUM in reason} == {"real", "imaginary", "mel"}
    assert {str(p.node.name) for p in placed.points if p.is_weight} >= {"after"}
