"""The behaviour matrix: each form, the rules it breaks, and what the TensorRT-RTX builder makes of it.

`outcome`: "low" (a low-precision kernel), "float" (builds, float kernel), "refused" (no engine).  Used twice: by the rule
tests, and by the audit tests, which build every row and so prove that checker and compiler agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from onnx import TensorProto

from tests.target.graphs import AttentionForm, Form

Outcome = Literal["low", "float", "refused"]


@dataclass(frozen=True)
class Row:
    """One operator."""

    name: str
    form: Form
    outcome: Outcome
    rules: frozenset[str] = frozenset()
    gpu: str = "sm89"


@dataclass(frozen=True)
class AttentionRow:
    """One attention block; `low` counts its products in low-precision kernels, of two."""

    name: str
    form: AttentionForm
    fused: bool
    low: int
    rules: frozenset[str] = frozenset()


def row(name: str, form: Form, outcome: Outcome, *numbers: int, gpu: str = "sm89") -> Row:
    return Row(name, form, outcome, frozenset(f"QC-TRT-{n:03d}" for n in numbers), gpu)


CONV, MATMUL, GEMM = Form(), Form(op="MatMul"), Form(op="Gemm")
FP8 = {"activation": "float8e4m3fn", "weight": "float8e4m3fn"}
FLOAT = TensorProto.FLOAT

SINGLE = [
    row("conv", CONV, "low"),
    row("conv per tensor", CONV.but(per_channel=False), "low"),
    row("conv axis 1", CONV.but(weight_axis=1), "float", 7),
    row("conv activation per channel", CONV.but(activation_axis=1), "float", 8),
    row("conv activation only", CONV.but(weight=None), "float", 9),
    row("conv weight only", CONV.but(activation=None), "float", 22),
    row("conv fp8", CONV.but(**FP8), "low"),
    row("matmul", MATMUL, "low"),
    row("matmul opset 19", MATMUL.but(opset=19), "low"),
    row("matmul opset 26", MATMUL.but(opset=26), "low", 26),
    row("matmul axis 0", MATMUL.but(weight_axis=0), "float", 7),
    row("matmul weight only", MATMUL.but(activation=None), "float", 22),
    row("matmul activation only", MATMUL.but(weight=None), "float", 9),
    row("matmul fp8", MATMUL.but(**FP8), "low"),
    row("matmul fp8 sm86", MATMUL.but(**FP8), "refused", 21, gpu="sm86"),
    row("gemm", GEMM, "low"),
    row("gemm transB", GEMM.but(trans_b=True), "low"),
    row("gemm transB axis 1", GEMM.but(trans_b=True, weight_axis=1), "float", 7),
    row("deconvolution", Form(op="ConvTranspose"), "float", 19),
    row("zero point", CONV.but(zero_point=3), "refused", 1),
    row("uint8 activation", CONV.but(activation="uint8"), "low", 2),  # builds; codes above 127 have no established meaning
    row("uint8 weight", CONV.but(weight="uint8"), "refused", 2),
    row("int16", CONV.but(activation="int16", weight="int16"), "refused", 2),
    row("fp8 e5m2", CONV.but(activation="float8e5m2", weight="float8e5m2"), "refused", 2),
    row("int32 bias", CONV.but(int32_bias=True), "refused", 3),
    row("computed scale", CONV.but(computed_scale=True), "refused", 4),  # the builder crashes
    row("scale 0", CONV.but(scale=0.0), "refused", 5),
    row("scale negative", CONV.but(scale=-0.1), "refused", 5),
    row("float32 scales and body", CONV.but(scale_type=FLOAT, body=FLOAT), "low", 20),
    row("float32 scales, float16 bias", CONV.but(scale_type=FLOAT), "refused", 6),
    row("int8 by fp8", MATMUL.but(weight="float8e4m3fn"), "refused", 10),
    row("int8 by int4", MATMUL.but(weight="int4"), "low"),
    row("int8 by int4 per tensor", MATMUL.but(weight="int4", per_channel=False), "refused", 10),
    row("int4 blocks", MATMUL.but(activation=None, weight="int4", block=32), "float"),
    row("int4 per channel", MATMUL.but(activation=None, weight="int4"), "float", 23),
]


def block(name: str, form: AttentionForm, fused: bool, low: int, *numbers: int) -> AttentionRow:
    return AttentionRow(name, form, fused, low, frozenset(f"QC-TRT-{n:03d}" for n in numbers))


ATTENTION = [
    block("all four", AttentionForm(), True, 2),
    block("none", AttentionForm(frozenset()), True, 0),
    block("q and k", AttentionForm(frozenset("qk")), False, 1, 13),
    block("softmax and v", AttentionForm(frozenset({"softmax", "v"})), False, 1, 13),
    block("scores too", AttentionForm(scores=True), False, 2, 12),
    block("packed", AttentionForm(packed=True), True, 2, 18),
    block("wide softmax scale", AttentionForm(softmax_scale=0.05), True, 2, 25),
]
