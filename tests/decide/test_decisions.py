from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompile.decide.decisions import Decision, clear_decisions, decide, decision, decisions, undecide, value_at
from qcompile.ir.model import Model
from qcompile.quant.qtype import FLOAT8E4M3FN, INT4, INT8, UINT8, simulated_int
from qcompile.quant.spec import PerAxis, PerBlock, PerTensor, QParams, QuantSpec
from tests.ir import tiny

granularities = st.one_of(
    st.builds(PerTensor), st.builds(PerAxis, st.integers(0, 7)), st.builds(PerBlock, st.integers(0, 7), st.integers(1, 256))
)
specs = st.builds(
    QuantSpec, st.sampled_from([INT8, UINT8, INT4, FLOAT8E4M3FN, simulated_int(6)]), granularities, st.booleans(),
    st.sampled_from(["minmax", "percentile", "mse"]),
)  # fmt: skip


@st.composite
def qparams(draw: st.DrawFn) -> QParams:
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=2, max_side=5))
    scale = draw(hnp.arrays(np.float64, shape, elements=st.floats(1e-30, 1e30)))
    return QParams(scale, draw(hnp.arrays(np.int64, shape, elements=st.integers(-(2**62), 2**62))))


found = st.builds(Decision, specs, st.text(max_size=20), st.none() | qparams())


@settings(deadline=None)
@given(found, st.sampled_from([0, 1, ~0]))
def test_what_is_decided_is_read_back_exactly(d: Decision, slot: int) -> None:
    model = Model.from_proto(tiny.linear())
    decide(model.graph.node(0), slot, d)
    back = decision(model.graph.node(0), slot)
    assert back is not None
    assert (back.spec, back.quantizer) == (d.spec, d.quantizer)
    assert (back.qparams is None) == (d.qparams is None)
    if back.qparams is not None and d.qparams is not None:
        assert back.qparams.scale.shape == d.qparams.scale.shape
        assert back.qparams.scale.tobytes() == d.qparams.scale.tobytes()
        assert back.qparams.zero_point.tobytes() == d.qparams.zero_point.tobytes()


def test_decisions_survive_a_file(tmp_path: Path) -> None:
    model = Model.from_proto(tiny.linear())
    decide(model.graph.node(0), 1, Decision(QuantSpec(INT8, PerAxis(1)), "w", QParams(np.array([0.5]), np.array([0]))))
    decide(model.graph.node(2), ~0, Decision(QuantSpec(UINT8), "b"))
    back = Model.load(model.save(tmp_path / "m.onnx"))
    assert [(n.name, slot, d.quantizer) for n, slot, d in decisions(back.graph)] == [("MatMul_0", 1, "w"), ("MatMul_2", -1, "b")]
    assert [value_at(n, slot).name for n, slot, _ in decisions(back.graph)] == ["w", "b"]


def test_undecide_and_clear() -> None:
    model = Model.from_proto(tiny.linear())
    node = model.graph.node(0)
    node.metadata_props["other"] = "kept"
    for slot in (0, 1, ~0):
        decide(node, slot, Decision(QuantSpec(INT8), "q"))
    undecide(node, 1)
    undecide(node, 7)
    assert decision(node, 1) is None and decision(node, 0) is not None
    clear_decisions(model.graph)
    assert dict(node.metadata_props) == {"other": "kept"}


def test_with_qparams_keeps_the_rest() -> None:
    d = Decision(QuantSpec(INT8), "q")
    q = QParams(np.array(0.1), np.array(0))
    assert d.with_qparams(q).qparams is q and d.with_qparams(q).spec == d.spec and d.qparams is None
