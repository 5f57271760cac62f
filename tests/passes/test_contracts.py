"""The contract of each kind of pass, for every registered pass on every model below: registering a pass tests it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from qcompile.decide.decisions import decision, decisions
from qcompile.execute.emulate.runnable import runnable
from qcompile.execute.session import make_session
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array, is_op
from qcompile.ir.text import print_model
from qcompile.pipeline import registry
from qcompile.pipeline.base import Kind, Pass, Stage
from qcompile.pipeline.spec import format_pass
from qcompile.rewrite.bias import bias_site
from qcompile.target.check import check
from tests.passes.measures import constants_of, double_outputs, outputs, relative_error, sqnr_db, to_double
from tests.passes.models import fixture, fixture_arrays
from tests.passes.running import Step, SweepOf, builtin_passes, context, fixture_step, pipeline, run_passes, run_with

MODELS = (
    "timm_vit_shared_ts17",
    "timm_vit_dy23",
    "timm_swin_padded_dy18",
    "hf_bert_shared_ts14",
    "hf_llama_dy23",
    "hybrid_ts17",
    "stem",
    "joined",
    "biased",
)
VARIANTS = (
    "smooth{shift}",
    "smooth{search}",
    "smooth{alpha=1.0 sites=norm}",
    "repq{percentile=minmax}",
    "opset{version=21}",
    "rotate{r4=block mean=fold}",
    "rotate{kind=klt search=3}",
    "center{balance gelu}",
    "center{drop heads softmax}",
    "equalize{by=weights steps=16}",
)
FLOAT32, FLOAT64 = 5e-6, 1e-12


def of_kind(*kinds: Kind) -> list[str]:
    """Registered passes of some kinds, as pipeline strings, with a few other options of interest."""
    known = [*(format_pass(p) for p in builtin_passes()), *(v for v in VARIANTS if v.partition("{")[0] in registry.names())]
    return [spec for spec in known if registry.parse(spec)[0].kind in kinds]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spec", of_kind(*Kind))
def test_what_is_reported_is_what_happened(spec: str, name: str) -> None:
    done = fixture_step(name, spec, "trt")
    kinds = [r.kind for r in done.report.remarks]
    assert done.report.modified == done.changed, (
        "`modified` must mean that nodes, constants or decisions changed, and nothing else"
    )
    assert kinds, "each pass says what it did, or why it did nothing"
    if done.report.modified:
        assert "applied" in kinds
    assert all(r.reason and r.pass_name == spec.partition("{")[0] for r in done.report.remarks)


@pytest.mark.parametrize("spec", of_kind(Kind.EQUIVALENT, Kind.FIT, Kind.ANNOTATE))
def test_some_model_is_changed(spec: str) -> None:
    """Otherwise the other tests of this pass say nothing."""
    assert any(fixture_step(name, spec, target).changed for target in ("trt", "ort") for name in MODELS)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spec", of_kind(Kind.EQUIVALENT))
def test_equivalent_passes_keep_the_outputs(spec: str, name: str) -> None:
    done, arrays = fixture_step(name, spec, "trt"), fixture_arrays(name, seed=1)
    if done.changed:
        assert relative_error(outputs(done.before, arrays), outputs(done.after, arrays)) <= FLOAT32


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spec", of_kind(Kind.EQUIVALENT))
def test_equivalent_passes_are_exact_in_float64(spec: str, name: str) -> None:
    done, arrays = fixture_step(name, spec, "trt"), fixture_arrays(name)
    if not done.changed:
        return
    before = to_double(done.before)
    after, _ = run_with(SweepOf(done.before, arrays).collect, before, registry.parse(spec), context("trt"))
    feeds = {n: a[:2] for n, a in arrays.items()}
    got = double_outputs(after, feeds)
    assert all(a.dtype == np.float64 for a in got if a.dtype.kind == "f")
    assert relative_error(double_outputs(before, feeds), got) <= FLOAT64


@pytest.mark.parametrize("name", ["timm_vit_shared_ts17", "hf_llama_dy23", "stem"])
@pytest.mark.parametrize("spec", of_kind(Kind.ANNOTATE))
@pytest.mark.parametrize("target", ["trt", "ort"])
def test_annotations_leave_the_graph_alone(spec: str, name: str, target: str) -> None:
    done = fixture_step(name, spec, target)
    assert print_model(done.before) == print_model(done.after)
    before, after = constants_of(done.before), constants_of(done.after)
    assert before.keys() == after.keys() and all(np.array_equal(before[n], after[n]) for n in before)
    assert relative_error(outputs(done.before, fixture_arrays(name)), outputs(done.after, fixture_arrays(name))) == 0.0


# FIT


def layers(model: Model) -> Iterator[tuple[ir.Node, int]]:
    """Nodes with a quantized constant weight."""
    for node, slot, d in decisions(model.graph):
        if (
            slot == 1
            and is_op(node, "MatMul", "Gemm", "Conv")
            and const_array(node.inputs[slot]) is not None
            and d.qparams is not None
        ):
            yield node, slot


def layer_output(node: ir.Node, x: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.float64]:
    """The layer alone, its bias included, on the float input `x`."""
    alone = ir.Node(
        "", node.op_type, [ir.Value(name="x"), ir.Value(name="w")], node.attributes.values(), num_outputs=1, name="alone"
    )
    alone.outputs[0].name = "y"
    graph = ir.Graph(alone.inputs, alone.outputs, nodes=[alone], opset_imports={"": 19})
    for value, array in zip(alone.inputs, (x, weight), strict=True):
        assert value is not None
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(array.shape)
    alone.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    proto = ir.to_proto(ir.Model(graph, ir_version=9))
    y = make_session(proto.SerializeToString(), optimize="off", threads=1).run(None, {"x": x, "w": weight.astype(np.float32)})[0]
    return np.asarray(y, np.float64) + bias_of(node, y.ndim)


def bias_of(node: ir.Node, rank: int) -> NDArray[np.float64]:
    site = bias_site(node)
    bias = const_array(site[0].inputs[site[1]]) if site is not None and site[1] < len(site[0].inputs) else None
    if bias is None:
        return np.zeros(())
    flat = bias.astype(np.float64).reshape(-1)
    return flat.reshape([-1 if i == 1 else 1 for i in range(rank)]) if node.op_type == "Conv" else flat


def layer_errors(model: Model, source: Model, arrays: dict[str, NDArray[Any]]) -> dict[str, float]:
    """Squared output error of each quantized layer, for the float input of `source`."""
    originals = {n.name: n for n in source.graph}
    found: dict[str, float] = {}
    for node, slot in layers(model):
        original, weight = originals[node.name], const_array(node.inputs[slot])
        decided = decision(node, slot)
        x, true = activation(source, original, arrays), const_array(original.inputs[slot])
        assert weight is not None and true is not None and decided is not None
        rounded = decided.rounded(weight.astype(np.float32))
        found[str(node.name)] = float(np.square(layer_output(node, x, rounded) - layer_output(original, x, true)).sum())
    return found


def activation(source: Model, node: ir.Node, arrays: dict[str, NDArray[Any]]) -> NDArray[Any]:
    value = node.inputs[0]
    assert value is not None
    if value.name in arrays:
        return arrays[str(value.name)]
    exposed = source.clone()
    wanted = next(v for n in exposed.graph for v in n.outputs if v.name == value.name)
    exposed.graph.outputs.clear()
    exposed.graph.outputs.append(wanted)
    return outputs(exposed, arrays)[0]


@pytest.mark.parametrize("name", ["timm_vit_shared_ts17", "hf_llama_dy23", "stem"])
@pytest.mark.parametrize("spec", of_kind(Kind.FIT))
@pytest.mark.parametrize("scheme", ["w4a8", "w8a8"])
def test_fits_do_not_raise_a_layers_error(spec: str, name: str, scheme: str) -> None:
    arrays, ctx = fixture_arrays(name), context("trt", scheme)
    if registry.parse(spec)[0].needs < Stage.DECIDED:
        done = fixture_step(name, spec, "trt", scheme)
        assert relative_error(outputs(done.before, arrays), outputs(done.after, arrays)) <= FLOAT32, "on calibration data"
        return
    float_model = fixture_step(name, "annotate", "trt", scheme).after
    default, _ = run_passes(float_model, registry.parse("rtn{clip=none}"), arrays, ctx)
    done = fixture_step(name, spec, "trt", scheme)
    before, after = layer_errors(default, float_model, arrays), layer_errors(done.after, float_model, arrays)
    assert before.keys() == after.keys() and before
    worse = {n: (before[n], after[n]) for n in before if after[n] > before[n] * (1 + 1e-3)}
    assert not worse, "squared error of the default, and of the pass"


# LOWER

LOWERED = [
    ("trt", "w8a8"),
    ("trt", "fp16"),
    ("rtx", "fp8"),
    ("trt", "w4a16"),
    ("trt", "nvfp4"),
    ("rtx", "nvfp4"),
    ("trt", "mxfp8"),
    ("rtx", "w6a6"),
    ("ort", "w8a8"),
    ("ort", "w4a4"),
    ("ort", "w4a16"),
    ("ort", "fp16"),
    ("integer", "w8a8"),
]
LOWEST_SQNR_DB = {"w8a8": 15.0, "fp16": 40.0, "fp8": 10.0, "w4a16": 8.0, "nvfp4": 3.0, "mxfp8": 10.0, "w6a6": 5.0, "w4a4": -3.0}


@pytest.mark.parametrize("name", ["timm_vit_dy23", "hf_bert_shared_ts14", "hybrid_ts17", "stem"])
@pytest.mark.parametrize(("target", "scheme"), LOWERED)
def test_lowered_models_are_legal_and_load(target: str, scheme: str, name: str) -> None:
    arrays = fixture_arrays(name)
    model, _ = pipeline("", fixture(name), arrays, context(target, scheme))
    errors = [f for f in check(model.to_proto(), target) if f.severity == "error"]
    assert not errors
    data = runnable(model).to_proto().SerializeToString()
    for level in ("off", "basic", "all"):
        make_session(data, optimize=level, qdq_fusion=target == "ort", threads=1)  # type: ignore[arg-type]
    assert interface(model) == interface(fixture(name))
    assert sqnr_db(outputs(fixture(name), arrays)[0], outputs(model, arrays)[0]) > LOWEST_SQNR_DB[scheme]


def interface(model: Model) -> list[tuple[str | None, ir.DataType | None]]:
    return [(v.name, v.dtype) for v in (*model.graph.inputs, *model.graph.outputs)]


def lower_passes() -> list[Pass]:
    return [p for p in builtin_passes() if p.kind is Kind.LOWER]


@pytest.mark.parametrize("p", lower_passes(), ids=lambda p: p.name)
def test_lowering_leaves_no_decision_behind(p: Pass) -> None:
    done: Step = fixture_step("timm_vit_shared_ts17", format_pass(p), "trt")
    if p.name == "insert-qdq":
        assert list(decisions(done.before.graph)) and not list(decisions(done.after.graph))
