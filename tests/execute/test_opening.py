"""Sessions on large models: weights from several files, the same values as from memory."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.execute import opening
from qcompile.execute.opening import open_model, run_in_parts
from qcompile.execute.session import make_session
from qcompile.ir import spill
from qcompile.ir.edit import set_constant
from qcompile.ir.model import Model
from qcompile.ir.spill import mark_large
from tests.ir import tiny
from tests.structure import exports

CPU = ["CPUExecutionProvider"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "SPILLED_TENSOR", 1 << 10)
    monkeypatch.setattr(opening, "SPILLED_TENSOR", 1 << 10)


def run(model: Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = open_model(model, exact=True, threads=1, use=["CPUExecutionProvider"])
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
    make = opening.make_session
    monkeypatch.setattr(opening, "make_session", lambda data, **options: sizes.append(len(data)) or make(data, **options))
    open_model(model)
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


# weights as shared values -------------------------------------------------------------------------


@pytest.fixture
def _all_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "SHARED_TENSOR", 1 << 8)


@pytest.mark.usefixtures("_all_shared")
@pytest.mark.parametrize("name", ["hf_bert_ts17", "timm_vit_ts17", "unet_ts17", "resnet_bn_ts17", "mobilenet_ts17"])
def test_the_same_bits_as_from_the_serialized_model(name: str) -> None:
    model, feeds = Model(exports.load(name)), exports.feeds(name)
    data = model.to_proto().SerializeToString()
    for exact, options in ((False, {}), (True, {"optimize": "off", "packed": False})):
        shared = open_model(model, exact=exact, threads=1, use=CPU).run(None, feeds)
        whole = make_session(data, qdq_fusion=False, threads=1, use=CPU, **options).run(None, feeds)
        assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(shared, whole, strict=True))


@pytest.mark.parametrize("exact", [False, True])
def test_weights_are_not_serialized(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    make = opening.make_session
    monkeypatch.setattr(opening, "make_session", lambda data, **options: sizes.append(len(data)) or make(data, **options))
    open_model(Model.from_proto(tiny.linear(64)), exact=exact)
    assert sizes and max(sizes) < 64 * 64 * 4


@pytest.mark.usefixtures("_all_shared")
@pytest.mark.parametrize("exact", [False, True])
def test_the_session_outlives_the_model(exact: bool) -> None:
    model, x = Model.from_proto(tiny.linear(64)), np.ones((2, 64), np.float32)
    expected = run(model, {"x": x})[0]
    session = open_model(model, exact=exact, threads=1, use=CPU)
    del model
    gc.collect()
    _ = [np.full((64, 64), np.nan, np.float32) for _ in range(64)]  # takes memory that was given back
    assert np.allclose(np.asarray(session.run(None, {"x": x})[0]), expected, rtol=1e-6)


@pytest.mark.usefixtures("_all_shared")
def test_a_body_reads_a_shared_weight_from_outside() -> None:
    weight = numpy_helper.from_array(np.arange(256, dtype=np.float32), "w")
    t = helper.make_tensor_value_info("t", TensorProto.FLOAT, None)
    bodies = [helper.make_graph([helper.make_node(op, ["x", "w"], ["t"])], op, [], [t]) for op in ("Add", "Mul")]
    node = helper.make_node("If", ["c"], ["y"], then_branch=bodies[0], else_branch=bodies[1])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 256]) for name in "xy")
    inputs = [x, helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
    graph = helper.make_graph([node], "g", inputs, [y], [weight])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    feeds = {"x": np.ones((1, 256), np.float32), "c": np.array(True)}
    assert np.array_equal(run(Model.from_proto(proto), feeds)[0][0], np.arange(256) + 1)


_MEMORY = """
import numpy as np, onnx_ir as ir, psutil
from qcompile.execute.opening import open_model
from qcompile.ir.model import Model
from qcompile.ir.tensors import map_tensors
from tests.ir import tiny
model, process = Model.from_proto(tiny.linear(4096)), psutil.Process()
map_tensors(model.ir, lambda t: ir.Tensor(t.numpy(), name=t.name))
open_model(Model.from_proto(tiny.linear(8)), exact=True).run(None, {"x": np.ones((1, 8), np.float32)})
before = process.memory_info().rss
session = open_model(model, exact=True)
session.run(None, {"x": np.ones((1, 4096), np.float32)})
print(process.memory_info().rss - before, model.weight_bytes())
"""


def test_an_exact_session_copies_no_weight() -> None:
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True, cwd=ROOT)
    grown, weights = map(int, done.stdout.split())
    assert grown < weights / 2
