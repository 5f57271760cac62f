"""Sessions on large models: weights from several files, the same values as from memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompile.execute import serving
from qcompile.execute.serving import open_session, run_in_parts
from qcompile.ir import spill
from qcompile.ir.edit import set_constant
from qcompile.ir.model import Model
from qcompile.ir.spill import mark_large
from tests.ir import tiny
from tests.structure import exports


@pytest.fixture(autouse=True)
def _low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "SPILLED_TENSOR", 1 << 10)
    monkeypatch.setattr(serving, "SPILLED_TENSOR", 1 << 10)


def run(model: Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = open_session(model, optimize="off", threads=1, use=["CPUExecutionProvider"])
    return [np.asarray(y) for y in session.run(None, feeds)]


def test_weights_come_from_the_source_and_from_scratch_files(tmp_path: Path) -> None:
    onnx.save(tiny.linear(128), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model, rng = Model.load(tmp_path / "m.onnx"), np.random.default_rng(0)
    set_constant(model.graph.node(0), 1, rng.standard_normal((128, 128)))
    feeds = {"x": rng.standard_normal((2, 128)).astype(np.float32)}
    expected = run(model, feeds)[0]
    mark_large(model.graph)
    assert run(model, feeds)[0].tobytes() == expected.tobytes()
    set_constant(model.graph.node(2), 1, rng.standard_normal((128, 128)))  # spilled now
    mark_large(model.graph)
    assert run(model, feeds)[0].tobytes() != expected.tobytes()


def test_a_large_model_is_never_serialized_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.from_proto(tiny.linear(64))
    mark_large(model.graph)
    sizes: list[int] = []
    make = serving.make_session
    monkeypatch.setattr(serving, "make_session", lambda data, **options: sizes.append(len(data)) or make(data, **options))
    open_session(model)
    assert sizes[0] < 64 * 64 * 4


def test_a_large_model_without_large_weights() -> None:
    model = Model.from_proto(tiny.linear(4))
    mark_large(model.graph)
    assert run(model, {"x": np.ones((1, 4), np.float32)})[0].shape == (1, 4)


@pytest.mark.parametrize("name", ["hf_bert_ts17", "timm_vit_ts17", "unet_ts17", "timm_vit_eager_ts17"])
def test_parts_give_the_outputs_of_the_whole(name: str) -> None:
    model, feeds = Model(exports.load(name)), exports.feeds(name)
    mark_large(model.graph)
    found = run_in_parts(model, [feeds, feeds], model.weight_bytes() // 4, threads=1)
    expected = run(model, feeds)
    assert all(a.tobytes() == b.tobytes() for outputs in found for a, b in zip(outputs, expected, strict=True))
