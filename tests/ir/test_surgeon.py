from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from qcompile.errors import ModelError, UsageError
from qcompile.ir import surgeon
from qcompile.ir.edit import add_constant
from qcompile.ir.model import Model
from qcompile.ir.surgeon import from_gs, import_graph, surgery, surgery_kind, to_gs
from qcompile.passes.surgery import GraphSurgery
from qcompile.pipeline.base import PassContext
from qcompile.quant.spec import SCHEMES
from qcompile.target.catalog import TARGETS
from tests.ir import tiny

ROOT = Path(__file__).parents[2]
X = np.random.default_rng(5).normal(size=(3, 4)).astype(np.float32)


def context() -> PassContext:
    return PassContext(SCHEMES["w8a8"], TARGETS["trt"])


def surgery_pass(folder: Path, body: str, function: str = "operate") -> GraphSurgery:
    file = folder / "my.py"
    file.write_text("import onnx_graphsurgeon as gs\nfrom qcompile.ir.surgeon import surgery\n" + body)
    return GraphSurgery.from_item(f"{file}:{function}", {})


@pytest.mark.parametrize("build", [tiny.linear, tiny.fixed_vit, tiny.branches])
def test_round_trip_keeps_the_model(build: Callable[[], onnx.ModelProto]) -> None:
    model = Model.from_proto(build())
    assert from_gs(to_gs(model), model).digest() == model.digest()


def test_metadata_survives_by_name() -> None:
    model = Model.from_proto(tiny.linear())
    model.metadata["license"], model.graph.metadata_props["g"] = "MIT", "1"
    model.ir.doc_string, model.ir.domain, model.ir.model_version = "doc", "org.x", 3
    node = model.graph.node(0)
    node.metadata_props["site"], node.doc_string, node.outputs[0].metadata_props["v"] = "qkv", "first", "2"
    model.graph.inputs[0].metadata_props["i"] = "3"
    back = from_gs(to_gs(model), model)
    assert (back.metadata["license"], back.graph.metadata_props["g"]) == ("MIT", "1")
    assert (back.ir.doc_string, back.ir.domain, back.ir.model_version) == ("doc", "org.x", 3)
    first = back.graph.node(0)
    assert (first.metadata_props["site"], first.doc_string, first.outputs[0].metadata_props["v"]) == ("qkv", "first", "2")
    assert back.graph.inputs[0].metadata_props["i"] == "3"


def test_metadata_of_a_changed_operator_is_dropped_with_a_remark() -> None:
    model = Model.from_proto(tiny.linear())
    relu = model.graph.node(1)
    relu.metadata_props["site"] = "mlp"
    graph = to_gs(model)
    next(n for n in graph.nodes if n.op == "Relu").op = "Sigmoid"
    back, remarks = import_graph(graph, model)
    assert not back.graph.node(1).metadata_props
    assert len(remarks) == 1 and str(relu.name) in remarks[0] and "now it is Sigmoid" in remarks[0]


def test_four_bit_graphs_are_refused() -> None:
    model = Model.from_proto(tiny.linear())
    add_constant(model.graph, "w4", np.zeros((2, 2), ir.DataType.INT4.numpy()))
    with pytest.raises(ModelError, match=r"w4.*run the surgery before quantization"):
        to_gs(model)


@pytest.fixture
def small_placeholders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgeon, "PLACEHOLDER_BYTES", 32)


@pytest.mark.usefixtures("small_placeholders")
def test_an_untouched_large_weight_comes_back_as_the_same_object(tmp_path: Path) -> None:
    onnx.save(tiny.linear(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = Model.load(tmp_path / "m.onnx")
    graph = to_gs(model)
    graph.tensors()["w"].name = "renamed"
    back = from_gs(graph, model)
    assert back.graph.initializers["renamed"].const_value is model.graph.initializers["w"].const_value
    assert np.array_equal(tiny.run(back, {"x": X}), tiny.run(model, {"x": X}))


@pytest.mark.usefixtures("small_placeholders")
def test_a_touched_large_weight_is_the_users(tmp_path: Path) -> None:
    onnx.save(tiny.linear(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = Model.load(tmp_path / "m.onnx")
    before = model.digest()
    graph = to_gs(model)
    graph.tensors()["w"].values[:] = 0
    graph.tensors()["bias"].values = np.ones(4, np.float32)
    assert np.array_equal(tiny.run(from_gs(graph, model), {"x": X}), np.ones((3, 4), np.float32))
    assert model.digest() == before


@pytest.mark.usefixtures("small_placeholders")
def test_folding_and_plain_export_see_the_real_weights() -> None:
    model = Model.from_proto(tiny.linear())
    graph = to_gs(model)
    w = graph.tensors()["w"]
    turned = graph.layer(op="Transpose", inputs=[w], outputs=["wt"], attrs={"perm": [1, 0]})[0]
    next(n for n in graph.nodes if n.op == "MatMul").inputs[1] = turned
    graph.toposort()
    expected = tiny.run(gs.export_onnx(graph), {"x": X})
    graph.fold_constants(error_ok=False).cleanup()
    assert not any(n.op == "Transpose" for n in graph.nodes)
    assert np.array_equal(tiny.run(from_gs(graph, model), {"x": X}), expected)


def test_unsorted_and_unnamed_nodes_are_put_in_order() -> None:
    model = Model.from_proto(tiny.linear())
    graph = to_gs(model)
    graph.nodes.append(graph.nodes.pop(0))
    graph.nodes[0].name = ""
    back = from_gs(graph, model)
    assert all(n.name for n in back.graph)
    assert np.array_equal(tiny.run(back, {"x": X}), tiny.run(model, {"x": X}))


def test_what_graphsurgeon_cannot_export_is_a_model_error() -> None:
    model = Model.from_proto(tiny.linear())
    graph = to_gs(model)
    graph.outputs[0].dtype = None
    with pytest.raises(ModelError, match="give every graph input and output a dtype"):
        from_gs(graph, model)


@pytest.mark.parametrize("build", [tiny.linear, tiny.fixed_vit, tiny.branches])
def test_every_saved_output_reopens_in_graphsurgeon(build: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    path = Model.from_proto(build()).save(tmp_path / "m.onnx")
    graph = gs.import_onnx(onnx.load(path))
    onnx.checker.check_model(gs.export_onnx(graph))
    assert len(graph.nodes) == len(build().graph.node)


def test_decorator() -> None:
    assert surgery_kind(surgery(kind="equivalent")(lambda graph: None)) == "equivalent"
    assert surgery_kind(lambda graph: None) is None
    with pytest.raises(ValueError, match="choose 'equivalent' or 'changes'"):
        surgery(kind="other")  # type: ignore[arg-type]


def test_pass_runs_the_users_function(tmp_path: Path) -> None:
    body = "@surgery(kind='changes')\ndef operate(graph):\n    print('hello')\n    graph.nodes[1].op = 'Sigmoid'\n"
    model, ctx, p = Model.from_proto(tiny.linear()), context(), surgery_pass(tmp_path, body)
    result = p.apply(model, ctx)
    assert result.modified and p.changes_function and "y" in result.changes.moved
    assert [n.op_type for n in model.graph] == ["MatMul", "Sigmoid", "MatMul", "Add"]
    assert [r.kind for r in ctx.remarks.all] == ["applied"]
    assert p.spec_name() == f"{p.file}:operate"


def test_pass_prints_nothing_on_stdout(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    p = surgery_pass(tmp_path, "print('loading')\ndef operate(graph):\n    print('hello')\n")
    p.apply(Model.from_proto(tiny.linear()), context())
    assert capfd.readouterr().out == ""


def test_pass_that_changes_nothing_says_so(tmp_path: Path) -> None:
    body = "@surgery(kind='equivalent')\ndef operate(graph):\n    assert graph.tensors()['w'].values.any()\n    return graph\n"
    model, ctx, p = Model.from_proto(tiny.linear()), context(), surgery_pass(tmp_path, body)
    assert not p.apply(model, ctx).modified and not p.changes_function
    assert [(r.kind, r.reason) for r in ctx.remarks.all] == [("missed", "the function changed nothing")]


def test_undeclared_function_counts_as_a_change(tmp_path: Path) -> None:
    p, ctx = surgery_pass(tmp_path, "def operate(graph):\n    graph.nodes[1].op = 'Sigmoid'\n"), context()
    p.apply(Model.from_proto(tiny.linear()), ctx)
    assert p.changes_function
    assert any("not declared" in r.reason for r in ctx.remarks.all)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def operate(graph):\n    raise KeyError('nms')\n", r"my\.py:4: KeyError: 'nms'"),
        ("def operate(graph):\n    return 3\n", "returned int; return the gs.Graph or nothing"),
        ("def other(graph): ...\n", "has no function 'operate'"),
        ("def operate(graph:\n", r"my\.py:\d+: SyntaxError"),
        ("import nowhere_at_all\n", r"my\.py:3: ModuleNotFoundError"),
        ("def operate(graph):\n    graph.nodes.pop(0)\n", "the surgery broke the graph.*'h' before it is made"),
    ],
)
def test_mistakes_of_the_user_are_told_with_the_place(body: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        surgery_pass(tmp_path, body).apply(Model.from_proto(tiny.linear()), context())


def test_missing_file() -> None:
    with pytest.raises(UsageError, match=r"no surgery file at nowhere\.py"):
        GraphSurgery.from_item("nowhere.py:f", {}).apply(Model.from_proto(tiny.linear()), context())


def test_a_failed_surgery_leaves_the_model_alone(tmp_path: Path) -> None:
    model = Model.from_proto(tiny.linear())
    before = model.digest()
    with pytest.raises(UsageError):
        surgery_pass(tmp_path, "def operate(graph):\n    graph.nodes.clear()\n    1 / 0\n").apply(model, context())
    assert model.digest() == before


def test_shipped_surgery_frees_the_batch() -> None:
    model = Model.from_proto(tiny.fixed_vit())
    x = np.random.default_rng(2).normal(size=(3, 3, 8, 8)).astype(np.float32)
    one_by_one = np.concatenate([tiny.run(model, {"x": x[i : i + 1]}) for i in range(3)])
    p = GraphSurgery.from_item(f"{ROOT / 'tools' / 'surgeries' / 'dynamic_batch.py'}:dynamic_batch", {})
    assert p.apply(model, context()).modified and not p.changes_function
    assert model.inputs()[0].shape == ("batch", 3, 8, 8)
    np.testing.assert_allclose(tiny.run(model, {"x": x}), one_by_one, rtol=1e-5, atol=1e-5)


def test_shipped_surgery_refuses_a_dynamic_model() -> None:
    p = GraphSurgery.from_item(f"{ROOT / 'tools' / 'surgeries' / 'dynamic_batch.py'}:dynamic_batch", {})
    with pytest.raises(UsageError, match="no input has a fixed batch of 1"):
        p.apply(Model.from_proto(tiny.linear()), context())
    assert importlib.util.find_spec("dynamic_batch") is None


def test_functions_and_custom_domains_survive() -> None:
    proto = tiny.linear()
    body = [helper.make_node("Relu", ["a"], ["b"])]
    proto.functions.append(helper.make_function("my", "Act", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    proto.opset_import.append(helper.make_opsetid("my", 1))
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Act", "my"
    model = Model.from_proto(proto)
    back = from_gs(to_gs(model), model)
    assert np.array_equal(tiny.run(back, {"x": X}), tiny.run(model, {"x": X}))
    assert proto.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
