"""LSTM layers that are quantized at run time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from qcompile.errors import UsageError
from qcompile.ir.model import Model
from qcompile.passes.lower.insert_qdq import InsertQdq
from tests.passes.measures import outputs, sqnr_db
from tests.passes.models import built
from tests.passes.running import context

TIME, BATCH, WIDE, HIDDEN = 6, 2, 8, 16


def normal(*shape: int) -> Any:
    return np.random.default_rng([*shape]).standard_normal(shape).astype(np.float32)


def recurrent(direction: str = "forward", extras: bool = False, peepholes: bool = False, op: str = "LSTM") -> Model:
    """A recurrent layer between two products."""
    sides, gates = (2 if direction == "bidirectional" else 1), {"LSTM": 4, "GRU": 3}[op] * HIDDEN
    constants = {
        "w": normal(sides, gates, WIDE) / 3, "r": normal(sides, gates, HIDDEN) / 4, "b": normal(sides, 2 * gates) / 9,
        "lens": np.array([TIME, TIME - 2], np.int32), "h": normal(sides, BATCH, HIDDEN), "c": normal(sides, BATCH, HIDDEN),
        "p": normal(sides, 3 * HIDDEN) / 9, "v": normal(HIDDEN, 4),
    }  # fmt: skip
    names = ["x", "w", "r", "b", *(["lens", "h", "c"] if extras else ["", "", ""]), "p" if peepholes else ""]
    nodes = [
        helper.make_node(op, names if op == "LSTM" else names[:4], ["s"], name="layer", hidden_size=HIDDEN, direction=direction),
        helper.make_node("MatMul", ["s", "v"], ["y"], name="fc"),
    ]
    return built(nodes, (TIME, BATCH, WIDE), constants)


def quantize(model: Model, target: str = "ort", **options: Any) -> tuple[Model, list[str]]:
    after, ctx = model.clone(), context(target, **options.pop("ctx", {}))
    InsertQdq(lstm="dynamic", **options).apply(after, ctx)
    return after, [r.reason for r in ctx.remarks.all]


@pytest.mark.parametrize("weights", ["int8", "uint8"])
@pytest.mark.parametrize(
    "options", [{}, {"direction": "reverse"}, {"direction": "bidirectional", "extras": True}, {"peepholes": True}]
)
def test_lstm_in_8_bit(options: dict[str, Any], weights: Any) -> None:
    before, x = recurrent(**options), {"x": normal(TIME, BATCH, WIDE)}
    after, said = quantize(before, weights=weights)
    assert said == ["LSTM in 8 bit, quantized at run time"]
    assert [n.op_type for n in after.graph] == ["DynamicQuantizeLSTM", "MatMul"] and after.graph.node(0).name == "layer"
    assert sqnr_db(outputs(before, x)[0], outputs(after, x)[0]) > 25
    assert sum(v.const_value.nbytes for v in after.graph.initializers.values() if v.const_value) < 9000


def test_what_is_no_lstm_of_constant_weights_stays() -> None:
    after, said = quantize(recurrent(op="GRU"))
    assert [n.op_type for n in after.graph] == ["GRU", "MatMul"] and not said
    _, said = quantize(recurrent(), ctx={"keep_float": ("layer",)})
    assert len(said) == 1 and "keep" in said[0]


def test_other_targets_have_no_such_layer() -> None:
    with pytest.raises(UsageError, match="leave lstm=dynamic out"):
        quantize(recurrent(), "trt")
