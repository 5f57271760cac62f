"""Each mechanical fix: a broken row of the matrix is repaired, is clean of its rule, and still computes what was meant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from qcompile.target.catalog import TARGETS
from qcompile.target.check import check
from qcompile.target.repair import Repaired, repair
from tests.target import formats
from tests.target.builds import Built, build_all, outcome
from tests.target.graphs import AttentionForm, Form, attention, single
from tests.target.matrix import CONV, DECONV, FP8, MATMUL, Outcome

FLOAT = TensorProto.FLOAT


@dataclass(frozen=True)
class Fix:
    """A broken graph, the rules that must be gone after the repair, and what the builder then makes of it.

    `meant` is a graph that computes what was meant, where the broken one does not run or says something else.
    """

    name: str
    broken: Callable[[], onnx.ModelProto]
    rules: tuple[int, ...]
    outcome: Outcome = "low"
    meant: Callable[[], onnx.ModelProto] | None = None
    sqnr_db: float = 30.0


def form(name: str, broken: Form, *rules: int, outcome: Outcome = "low", meant: Form | None = None, sqnr_db: float = 30.0) -> Fix:
    intent = None if meant is None else lambda: single(meant)
    return Fix(name, lambda: single(broken), rules, outcome, intent, sqnr_db)


def unnamed() -> onnx.ModelProto:
    model = single(CONV)
    model.graph.node[0].name = ""
    model.graph.node[1].name = model.graph.node[2].name
    return model


FIXES = [
    form("zero point", CONV.but(zero_point=3, scale=0.03), 1, sqnr_db=25),
    form("uint8 zero point 128", CONV.but(activation="uint8", zero_point=128), 1, 41, sqnr_db=60),
    form("uint8 activation", MATMUL.but(activation="uint8"), 41, sqnr_db=20),
    form("uint8 by output_dtype", CONV.but(activation="uint8", explicit_zero_point=False), 2, sqnr_db=20),
    form("uint8 weight", CONV.but(weight="uint8"), 2, sqnr_db=30),
    form("int32 bias", CONV.but(int32_bias=True), 3),
    form("float32 scales, float16 bias", CONV.but(scale_type=FLOAT), 6, 30, meant=CONV),
    form("float32 scales, bfloat16 bias", CONV.but(scale_type=FLOAT, body=TensorProto.BFLOAT16), 6, 30, meant=CONV, sqnr_db=25),
    form("conv axis 1", CONV.but(weight_axis=1), 7),
    form("matmul axis 0", MATMUL.but(weight_axis=0), 7),
    form("matmul transposed axis 1", MATMUL.but(transposed_weight=True, weight_axis=1), 7),
    form("matmul left axis 1", MATMUL.but(left=True, weight_axis=1), 7),
    form("gemm transB axis 1", Form(op="Gemm", trans_b=True, weight_axis=1), 7),
    form("fp8 axis 0", MATMUL.but(weight_axis=0, **FP8), 7, sqnr_db=25),
    form("activation per channel", CONV.but(activation_axis=1), 8),
    form("activation per row", MATMUL.but(activation_axis=0), 31),
    form("activation only", CONV.but(weight=None), 9, outcome="float", sqnr_db=25),
    form("opset 13", CONV.but(opset=13), 17, meant=CONV),
    form("int4 opset 19", MATMUL.but(weight="int4", opset=19), 17, meant=MATMUL.but(weight="int4")),
    form("deconvolution", DECONV, 19, outcome="float", sqnr_db=25),
    form("fp8 6x6", CONV.but(w_dims=(32, 32, 6, 6), **FP8), 33, outcome="float", sqnr_db=20),
    form("activation scale of one element", CONV.but(activation_axis=0), 38),
    form("weight scale of one element", CONV.but(one_scale=True), 44, meant=CONV.but(per_channel=False)),
    Fix("names", unnamed, (16,), meant=lambda: single(CONV)),
    Fix("scores", lambda: attention(AttentionForm(scores=True), batch=2), (12,), meant=lambda: attention(batch=2)),
    Fix(
        "partial attention",
        lambda: attention(AttentionForm(frozenset("qk")), batch=2),
        (13,),
        "float",
        lambda: attention(AttentionForm(frozenset()), batch=2),
    ),
    Fix("softmax scale", lambda: attention(AttentionForm(softmax_scale=0.05), batch=2), (25,), meant=lambda: attention(batch=2)),
    Fix("concat scales", lambda: formats.concatenated((0.05, 0.06), outer=False), (32,)),
    Fix("duplicate quantizers", formats.two_quantizers, (40,), sqnr_db=60),
]


def repaired(fix: Fix) -> Repaired:
    return repair(fix.broken(), "rtx", ["sm89"])


def run(model: onnx.ModelProto, seed: int = 3) -> np.ndarray:
    """The first output on random inputs within the quantizers' range, in ORT without Q/DQ fusion; bfloat16 in the reference."""
    rng = np.random.default_rng(seed)
    half = [v.type.tensor_type.elem_type for v in model.graph.input]
    dims = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input]
    values = [rng.uniform(0, 3, size=d) for d in dims]
    names = [v.name for v in model.graph.input]
    if TensorProto.BFLOAT16 in half:
        from ml_dtypes import bfloat16

        feeds = {n: v.astype(bfloat16) for n, v in zip(names, values, strict=True)}
        return np.asarray(ReferenceEvaluator(model).run(None, feeds)[0]).astype(np.float64)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {n: v.astype(np.float16) for n, v in zip(names, values, strict=True)}
    return np.asarray(session.run(None, feeds)[0]).astype(np.float64)


@pytest.mark.parametrize("fix", FIXES, ids=lambda f: f.name)
def test_clean_of_its_rules(fix: Fix) -> None:
    wanted = {f"QC-TRT-{n:03d}" for n in fix.rules}
    broken = fix.broken()
    assert wanted <= {f.rule for f in check(broken, "rtx", ["sm89"])}
    done = repair(broken, "rtx", ["sm89"])
    assert broken == fix.broken(), "the input is not changed"
    assert not wanted & {f.rule for f in check(done.model, "rtx", ["sm89"])}
    assert wanted <= {f.rule for f in done.fixed}
    assert not [f for f in done.remaining if f.severity == "error"]


@pytest.mark.parametrize("fix", FIXES, ids=lambda f: f.name)
def test_computes_what_was_meant(fix: Fix) -> None:
    want, got = run(fix.meant() if fix.meant is not None else fix.broken()), run(repaired(fix).model)
    assert 10 * np.log10(np.sum(want**2) / max(float(np.sum((got - want) ** 2)), 1e-30)) > fix.sqnr_db


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    pytest.importorskip("tensorrt_rtx")
    done = build_all([(repaired(f).model, "sm89") for f in FIXES], tmp_path_factory.mktemp("fixes"))
    return {f.name: b for f, b in zip(FIXES, done, strict=True)}


@pytest.mark.rtx
@pytest.mark.parametrize("fix", FIXES, ids=lambda f: f.name)
def test_the_builder_agrees(fix: Fix, built: dict[str, Built]) -> None:
    want = "float" if fix.name == "partial attention" else fix.outcome
    assert outcome(repaired(fix).model, built[fix.name]) == want, built[fix.name].errors


def test_every_repair_has_a_case() -> None:
    repairable = {r.id for r in TARGETS["rtx"].rules if r.repair is not None}
    assert repairable == {f"QC-TRT-{n:03d}" for f in FIXES for n in f.rules} - {"QC-TRT-030"}


def test_what_is_not_mechanical_remains(tmp_path: Path) -> None:
    done = repair(single(CONV.but(scale=-1.0)), "trt")
    assert not done.fixed and [f.rule for f in done.remaining] == ["QC-TRT-005"] * 2
