"""A rounding that a FIT pass found reaches every reader and the file: stored weight = (codes - zero point) stored scale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import helper

from qcompile.decide.decisions import decision, decisions, quantizers, replace
from qcompile.decide.quantizer import Quantizer
from qcompile.errors import ModelError
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array
from qcompile.pipeline import registry
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult
from qcompile.quant.affine import fake_quant
from tests.passes.models import Feeds, built
from tests.passes.running import context, run_passes

Array = NDArray[Any]
SEVENTH = 1 / 7  # far from what float16 and bfloat16 hold
RNG = np.random.default_rng(5)
WEIGHTS = {"w": (8, 3, 3, 3), "v": (64, 48), "bias": (8,), "shift": (48,)}


@dataclass(frozen=True)
class TowardsZero(Pass):
    """Move every weight one code towards 0, on scales that no narrow float holds."""

    name = "towards-zero"
    kind = Kind.FIT

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Give each quantizer of a weight its codes."""
        groups = [uses for uses in quantizers(model.graph) if uses[0].is_weight]
        for uses in groups:
            near, weight = uses[0].quantizer, const_array(uses[0].value)
            assert weight is not None
            replace(uses, near.with_codes(towards_zero(near, weight)))
        return PassResult(bool(groups))


def towards_zero(quantizer: Quantizer, weight: Array) -> Array:
    near = quantizer.coded(weight)
    wide = near.astype(np.float32)
    return (wide - np.sign(wide)).clip(quantizer.spec.qtype.qmin, quantizer.spec.qtype.qmax).astype(near.dtype)


def network() -> Model:
    """Conv -> Relu -> pool -> MatMul, each with a bias."""
    held: dict[str, Any] = {n: (RNG.standard_normal(s) * SEVENTH).astype(np.float32) for n, s in WEIGHTS.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w", "bias"], ["c"], name="conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("Flatten", ["r"], ["f"], name="flat"),
        helper.make_node("Slice", ["f", "from", "to", "axis"], ["s"], name="slice"),
        helper.make_node("MatMul", ["s", "v"], ["m"], name="dense"),
        helper.make_node("Add", ["m", "shift"], ["y"], name="add"),
    ]
    ends = {n: np.array([i], np.int64) for n, i in (("from", 0), ("to", 64), ("axis", 1))}
    return built(nodes, ["N", 3, 12, 12], held | ends)


def feeds() -> Feeds:
    return {"x": np.random.default_rng(0).standard_normal((16, 3, 12, 12)).astype(np.float32)}


def fitted(ctx: PassContext) -> Model:
    """The network with codes."""
    front = registry.parse("canonicalize,opset,annotate,rtn")
    return run_passes(network(), [*front, TowardsZero()], feeds(), ctx)[0]


def found(model: Model) -> dict[str, Quantizer]:
    """The quantizers with codes, by the weight's name."""
    return {str(u.value.name): u.quantizer for u in decisions(model.graph) if u.quantizer.codes is not None}


def stored(model: Model) -> dict[str, tuple[Array, Array, int]]:
    """Codes, scales as float64 and axis of every DequantizeLinear of a constant, by the weight's name."""
    made: dict[str, tuple[Array, Array, int]] = {}
    for node in (n for n in model.graph if n.op_type == "DequantizeLinear"):
        codes, scale = (const_array(v) for v in node.inputs[:2])
        if codes is not None and scale is not None and codes.ndim > 1:
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
            made[str(node.name).removesuffix("_DequantizeLinear")] = codes, scale.astype(np.float64), axis
    return made


@pytest.mark.parametrize(
    ("target", "scheme", "lowering"),
    [
        ("ort", "w8a8", "insert-qdq"),
        ("ort", "w4a4", "insert-qdq"),
        ("trt", "w8a8", "insert-qdq"),
        ("trt", "w8a8", "insert-qdq,fp16"),
        ("trt", "fp8", "insert-qdq,fp16"),
        ("trt", "w4a16", "insert-qdq,fp16"),
    ],
)
def test_the_file_holds_the_codes_and_the_scale_says_what_they_are_worth(target: str, scheme: str, lowering: str) -> None:
    ctx = context(target, scheme, quantize=("conv", "dense"))
    model = fitted(ctx)
    chosen = found(model)
    lowered, _ = run_passes(model, registry.parse(lowering), feeds(), ctx)
    held = stored(lowered)
    assert chosen and held.keys() == chosen.keys()
    for name, (codes, scale, axis) in held.items():
        q, weight = chosen[name], const_array(model.graph.initializers[name])
        assert q.codes is not None and weight is not None
        assert codes.tobytes() == q.codes.tobytes(), "no code moved, whatever became of the scale"
        shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
        if scale.ndim < 2:
            values = codes.astype(np.float32) * scale.astype(np.float32).reshape(shape)
            moved = np.abs(values - q.rounded(weight)).max()
            assert moved <= 2.0**-10 * np.abs(weight).max(), "only by the rounding of the scale"
            assert (moved == 0) == (target == "ort")


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp8"])
def test_block_formats_hold_the_codes(scheme: str) -> None:
    ctx = context("trt", scheme, quantize=("dense",))
    model = fitted(ctx)
    q = found(model)["v"]
    lowered, _ = run_passes(model, registry.parse("insert-qdq"), feeds(), ctx)
    codes = const_array(next(n for n in lowered.graph if n.name == "v_DequantizeLinear").inputs[0])
    near = Quantizer(q.spec, q.qparams).coded(np.asarray(const_array(model.graph.initializers["v"])))
    assert q.codes is not None and codes is not None
    assert codes.tobytes() == q.codes.tobytes() != near.tobytes()


def test_integer_operators_read_the_codes() -> None:
    ctx = context("integer", "w8a8")
    front = registry.parse("canonicalize,opset,annotate,rtn")
    nodes = [helper.make_node("MatMul", ["x", "v"], ["y"], name="dense")]
    small = built(nodes, ["N", 64], {"v": (RNG.standard_normal((64, 48)) * SEVENTH).astype(np.float32)})
    arrays = {"x": RNG.standard_normal((16, 64)).astype(np.float32)}
    model, _ = run_passes(small, [*front, TowardsZero()], arrays, ctx)
    lowered, _ = run_passes(model, registry.parse("integer"), arrays, ctx)
    codes = const_array(next(n for n in lowered.graph if n.op_type == "MatMulInteger").inputs[1])
    q = found(model)["v"]
    assert q.codes is not None and codes is not None and np.array_equal(codes, q.codes)


def test_a_correction_of_the_bias_sees_the_codes() -> None:
    """The error that is taken out of the bias is that of the codes, which the nearest ones do not have."""
    ctx = context("ort", "w8a8", quantize=("conv",))
    model = fitted(ctx)
    after, _ = run_passes(model, registry.parse("bias-correct"), feeds(), ctx)
    conv = next(n for n in after.graph if n.name == "conv")
    q, weight = decision(conv, 1), const_array(conv.inputs[1])
    assert q is not None and q.codes is not None and weight is not None
    mean = feeds()["x"].astype(np.float64).mean((0, 2, 3))
    errors = [w - weight for w in (q.rounded(weight), fake_quant(weight, q.known, q.spec.qtype, q.spec.granularity))]
    shifts = [-(e.astype(np.float64).sum((2, 3)) @ mean) for e in errors]
    bias = const_array(conv.inputs[2])
    before = const_array(next(n for n in model.graph if n.name == "conv").inputs[2])
    assert bias is not None and before is not None
    assert np.allclose(bias - before, shifts[0], rtol=0, atol=1e-6) and np.abs(shifts[0] - shifts[1]).max() > 1e-4


def test_codes_survive_a_file(tmp_path: Path) -> None:
    ctx = context("trt", "w4a16")
    model = fitted(ctx)
    back = Model.load(model.save(tmp_path / "half.onnx"))
    assert back.digest() == model.digest()
    for name, q in found(model).items():
        assert q.equals(found(back)[name])
    once, again = (run_passes(m, registry.parse("insert-qdq"), feeds(), ctx)[0] for m in (model, back))
    assert once.digest() == again.digest()


def test_codes_of_another_weight_are_refused() -> None:
    ctx = context("ort", "w8a8", quantize=("conv",))
    model = fitted(ctx)
    conv = next(n for n in model.graph if n.name == "conv")
    value, narrow = conv.inputs[1], np.zeros((8, 3, 1, 1), np.float32)
    assert value is not None
    value.const_value = ir.Tensor(narrow, name=value.name)
    with pytest.raises(ModelError, match=r"weight 'w': codes of shape \(8, 3, 3, 3\) .* find them again"):
        run_passes(model, registry.parse("insert-qdq"), feeds(), ctx)
