from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qcompile
from qcompile.decide import decisions as table
from qcompile.decide.decisions import clear_decisions, decide, decision, decisions, lines, quantizers, replace, undecide
from qcompile.decide.quantizer import PREFIX, Quantizer
from qcompile.ir.model import Model
from qcompile.ir.surgeon import from_gs, to_gs
from qcompile.passes.forms.opset import RaiseOpset
from qcompile.quant.qtype import INT8, UINT8
from qcompile.quant.spec import PerAxis, QParams, QuantSpec
from tests.ir import tiny
from tests.passes.running import context

MODELS = Path(__file__).parents[2] / "models"


def params(scale: float, zero_point: int = 0) -> QParams:
    return QParams(np.array(scale), np.array(zero_point))


def decided() -> Model:
    """Both products read the weight w; the first reads x and makes h."""
    model = Model.from_proto(tiny.linear())
    first, second = model.graph.node(0), model.graph.node(2)
    for node in (first, second):
        decide(node, 1, Quantizer(QuantSpec(INT8, PerAxis(1)), QParams(np.full(4, 0.5), np.zeros(4, np.int64))))
    decide(first, 0, Quantizer(QuantSpec(INT8), params(0.25)))
    decide(first, ~0, Quantizer(QuantSpec(UINT8)))
    return model


def test_equal_quantizers_of_one_tensor_are_one_object() -> None:
    model = decided()
    first, second = model.graph.node(0), model.graph.node(2)
    assert first.inputs[1] is second.inputs[1] and decision(first, 1) is decision(second, 1)
    decide(second, 1, Quantizer(QuantSpec(INT8)))
    assert decision(first, 1) is not decision(second, 1)
    assert [[u.slot for u in uses] for uses in quantizers(model.graph)] == [[1], [0], [-1], [1]]


def test_replace_changes_all_uses() -> None:
    model = decided()
    (shared,) = [uses for uses in quantizers(model.graph) if len(uses) == 2]
    replace(shared, shared[0].quantizer.with_qparams(QParams(np.full(4, 0.1), np.zeros(4, np.int64))))
    (again,) = [uses for uses in quantizers(model.graph) if len(uses) == 2]
    assert again[0].quantizer is again[1].quantizer and again[0].quantizer.known.scale[0] == 0.1
    assert again[0].is_weight and not decisions(model.graph)[1].is_weight


def test_a_clone_shares_quantizers_and_decides_alone() -> None:
    model = decided()
    clone = model.clone()
    assert decision(clone.graph.node(0), 1) is decision(model.graph.node(0), 1)
    undecide(clone.graph.node(0), 1)
    decide(clone.graph.node(0), 0, Quantizer(QuantSpec(UINT8)))
    kept = decision(model.graph.node(0), 0)
    assert decision(model.graph.node(0), 1) is not None and kept is not None and kept.spec.qtype == INT8
    clear_decisions(clone.graph)
    assert not decisions(clone.graph) and len(decisions(model.graph)) == 4


def test_undecide_and_clear() -> None:
    model = decided()
    node = model.graph.node(0)
    node.metadata_props["other"] = "kept"
    undecide(node, 1)
    undecide(node, 7)
    assert decision(node, 1) is None and decision(node, 0) is not None
    clear_decisions(model.graph)
    assert dict(node.metadata_props) == {"other": "kept"} and not decisions(model.graph)


def test_decisions_survive_a_file(tmp_path: Path) -> None:
    model = decided()
    back = Model.load(model.save(tmp_path / "m.onnx"))
    first, second = ({(str(u.node.name), u.slot): u for u in decisions(m.graph)} for m in (model, back))
    assert first.keys() == second.keys()
    assert all(second[key].quantizer.equals(use.quantizer) for key, use in first.items())
    assert decision(back.graph.node(0), 1) is decision(back.graph.node(2), 1), "shared again"
    assert not any(key.startswith(PREFIX) for n in model.graph for key in n.metadata_props), "saving leaves the model alone"


def test_the_digest_sees_decisions_and_not_where_they_are_held(tmp_path: Path) -> None:
    model = decided()
    back = Model.load(model.save(tmp_path / "m.onnx"))
    before = back.digest()
    assert decisions(back.graph) and back.digest() == before == model.digest()
    decide(back.graph.node(0), 0, Quantizer(QuantSpec(INT8), params(0.26)))
    assert back.digest() != before
    clear_decisions(back.graph)
    assert back.digest() == Model.from_proto(tiny.linear()).digest()


def test_what_is_decided_now_wins_over_what_the_file_held(tmp_path: Path) -> None:
    back = Model.load(decided().save(tmp_path / "m.onnx"))
    decide(back.graph.node(2), 1, Quantizer(QuantSpec(UINT8)))
    assert [q.spec.qtype for n, _, q in decisions(back.graph) if n is back.graph.node(2)] == [UINT8]
    back = Model.load(tmp_path / "m.onnx")
    clear_decisions(back.graph)
    assert not decisions(back.graph)


def test_surgery_keeps_the_decisions_of_nodes_that_it_leaves() -> None:
    model = decided()
    back = from_gs(to_gs(model), model)
    assert decision(back.graph.node(0), 1) is decision(model.graph.node(0), 1)
    assert back.digest() == model.digest()


def test_another_opset_keeps_the_decisions() -> None:
    model = decided()
    before = {(str(u.node.name), u.slot): u.quantizer for u in decisions(model.graph)}
    RaiseOpset(version=21).apply(model, context("ort"))
    assert model.opset == 21 and {(str(u.node.name), u.slot): u.quantizer for u in decisions(model.graph)} == before


def test_lines() -> None:
    back = Model.from_proto(decided().to_proto())
    assert list(lines(back.graph.node(0))) == [
        "[out 0] uint8 h:PerTensor()",
        "[in 0] int8 x:0.25:0 scale~0.25",
        "[in 1] int8 w:PerAxis(axis=1) scale~0.5",
    ]
    assert not list(lines(back.graph.node(1)))


def test_text_of_older_files_is_read() -> None:
    proto = decided().to_proto()
    for node in proto.graph.node:
        for entry in (e for e in node.metadata_props if e.key.startswith(PREFIX)):
            entry.value = entry.value[:-1] + ',"method":"mse"}'
    assert len(decisions(Model.from_proto(proto).graph)) == 4


def test_a_compile_reads_no_decision_from_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, whole = list[str](), table.from_text

    def counted(text: str) -> Quantizer:
        read.append(text)
        return whole(text)

    monkeypatch.setattr(table, "from_text", counted)
    options: dict[str, Any] = {"passes": "repq,smooth", "target": "rtx", "samples": 8, "threads": 1}
    qcompile.compile(MODELS / "vit_digits.onnx", output=tmp_path / "q.onnx", **options)
    assert not read and onnx.load(tmp_path / "q.onnx").graph.node
