"""Outlier transplant: a trained ViT with the activation outliers of DeiT-S, made exactly."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from qcompile.ir.edit import add_constant, insert_after, new_node, redirect
from qcompile.ir.model import Model
from qcompile.passes.equivalent.repq import best_percentile, scales
from qcompile.report import PassReport
from qcompile.rewrite.fold import norm_sites
from tests.passes.measures import outputs, relative_error, sqnr_db
from tests.passes.running import context, pipeline
from tools.transplant import transplant

MODELS = Path(__file__).parents[2] / "models"
EVALUATED, CALIBRATED = 100, 32


@cache
def images(kind: str, count: int) -> NDArray[np.float32]:
    with np.load(MODELS / f"vit_digits.{kind}.npz") as data:
        return data["input"][:count]


@cache
def labels() -> NDArray[np.int64]:
    with np.load(MODELS / "vit_digits.eval.npz") as data:
        return data["labels"][:EVALUATED]


@cache
def model(transplanted: bool) -> Model:
    source = Model.load(MODELS / "vit_digits.onnx")
    return transplant(source) if transplanted else source


@cache
def reference() -> NDArray[np.float32]:
    return outputs(model(False), {"input": images("eval", EVALUATED)})[0]


@cache
def quantized(passes: str, transplanted: bool, target: str = "trt", scheme: str = "w8a8") -> tuple[Model, list[PassReport]]:
    ctx = context(target, scheme)
    ctx.target = replace(
        ctx.target, half_body=False
    )  # the float rest does not matter here, and is slow in half precision on a CPU
    return pipeline(passes, model(transplanted), {"input": images("calib", CALIBRATED)}, ctx)


def quality(made: Model) -> tuple[float, float]:
    """SQNR in dB against the float model, and top-1."""
    got = outputs(made, {"input": images("eval", EVALUATED)})[0]
    return sqnr_db(reference(), got), float((got.argmax(1) == labels()).mean())


def test_the_transplant_keeps_the_function() -> None:
    assert relative_error([reference()], outputs(model(True), {"input": images("eval", EVALUATED)})) <= 5e-6


def test_plain_int8_collapses() -> None:
    healthy, _ = quality(quantized("", False)[0])
    plain, _ = quality(quantized("", True)[0])
    assert plain < healthy - 10, "dB"


@pytest.mark.parametrize("passes", ["smooth", "repq", "repq,smooth"])
def test_the_folds_recover_it(passes: str) -> None:
    got_db, got_top1 = quality(quantized(passes, True)[0])
    assert got_top1 >= quality(quantized("", False)[0])[1] - 0.005
    assert got_db >= quality(quantized("", True)[0])[0] + 10


def test_repq_and_smooth_together_differ_from_either() -> None:
    made = {p: quantized(p, True) for p in ("repq", "smooth", "repq,smooth")}
    assert len({m.digest() for m, _ in made.values()}) == 3
    said = {p: [(r.kind, r.pass_name, r.node, r.reason) for x in reports for r in x.remarks] for p, (_, reports) in made.items()}
    assert said["repq,smooth"] != said["repq"] and said["repq,smooth"] != said["smooth"]
    both = said["repq,smooth"]
    assert any(kind == "missed" and name == "smooth" and reason == "claimed by repq" for kind, name, _, reason in both)
    assert any(kind == "applied" and name == "smooth" for kind, name, _, _ in both), "smooth has the value sites left"


def test_four_bit_order() -> None:
    """Layer-wise << RepQ <= channel-wise (RepQ-ViT, table 5): the codes are the same, but RepQ's weights are spread wider.

    Channel-wise codes do not feel the transplant, but weights in 4 bit do: the bound is the model without it.
    """
    layer = quality(quantized("", True, "ort", "w4a4")[0])[0]
    repq = quality(quantized("repq", True, "ort", "w4a4")[0])[0]
    channel = quality(channel_wise(quantized("", False, "ort", "w4a4")[0], model(False)))[0]
    assert layer < repq - 8 and repq <= channel + 0.5


def channel_wise(lowered: Model, float_model: Model) -> Model:
    """Norm outputs quantized with a scale and zero point a channel (4 bit), which no engine can do."""
    made = lowered.clone()
    names = sorted({str(site.tensor.name) for site in norm_sites(float_model.graph)})
    values = {v.name: v for n in made.graph for v in n.outputs}
    for name, rows in zip(names, _rows(float_model, names), strict=True):
        s, z = scales(*best_percentile(rows, 4), 4)
        dequantized = _end_of_chain(values[name])
        if dequantized is not None:
            _fake_quantize(made.graph, values[name], dequantized, s, z)
    return made


def _rows(source: Model, names: list[str]) -> list[NDArray[np.float64]]:
    exposed = source.clone()
    values = {v.name: v for n in exposed.graph for v in n.outputs}
    exposed.graph.outputs.clear()
    exposed.graph.outputs.extend(values[n] for n in names)
    return [a.reshape(-1, a.shape[-1]).astype(np.float64) for a in outputs(exposed, {"input": images("calib", CALIBRATED)})]


def _end_of_chain(value: ir.Value) -> ir.Value | None:
    """The DequantizeLinear output behind `value`; None where its layer is left in float."""
    for op in ("Clip", "QuantizeLinear", "DequantizeLinear"):
        node = next((n for n, _ in value.uses() if n.op_type == op), None)
        value = node.outputs[0] if node is not None else value
    producer = value.producer()
    return value if producer is not None and producer.op_type == "DequantizeLinear" else None


def _fake_quantize(graph: ir.Graph, value: ir.Value, old: ir.Value, s: NDArray[np.float64], z: NDArray[np.float64]) -> None:
    step, zero = (add_constant(graph, f"{value.name}_{n}", a.astype(np.float32)) for n, a in (("step", s), ("zero", z)))
    ends = [add_constant(graph, f"{value.name}_end", np.float32(e)) for e in (0, 15)]
    chain, x = list[ir.Node](), value
    for op, others in (("Div", [step]), ("Round", []), ("Add", [zero]), ("Clip", ends), ("Sub", [zero]), ("Mul", [step])):
        chain.append(new_node(graph, op, [x, *others], name=f"{value.name}_{op}", like=value))
        x = chain[-1].outputs[0]
    insert_after(graph, value, *chain)
    redirect(old, x, list(old.uses()))
