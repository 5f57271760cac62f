"""Random small Q/DQ graphs: operators, types, axes, blocks, zero points, scale types, opsets, placement and GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.target import formats
from tests.target.graphs import TYPES, AttentionForm, Builder, Form, attention, single

HALF, FLOAT, BF16 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16
GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120")
KINDS = ("int8", "int8", "int8", "float8e4m3fn", "float8e4m3fn", "int4", None)


@dataclass(frozen=True)
class Case:
    """A graph and the GPU it is compiled for; `name` is enough to make it again."""

    name: str
    model: onnx.ModelProto
    gpu: str


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    """`count` cases; each depends only on its number and the seed."""
    families = (operator, operator, focused, focused, chain, chain, attended, joined, blocked)
    for i in range(count):
        r = Random(f"{seed}/{i}")
        make = families[i % len(families)]
        yield Case(f"{make.__name__} {seed}/{i}", make(r), r.choice(GPUS[2:] if r.random() < 0.7 else GPUS))


def rarely(r: Random, value: object, default: object, chance: float = 0.12) -> object:
    """`value` now and then."""
    return value if r.random() < chance else default


def operator(r: Random) -> onnx.ModelProto:
    """One operator in any of the forms of the behaviour matrix."""
    op = r.choice(["Conv", "MatMul", "Gemm", "Conv", "MatMul", "ConvTranspose"])
    kind = r.choice(KINDS)
    body = r.choice([HALF, HALF, HALF, FLOAT, BF16])
    form = Form(
        op=op,
        activation=rarely(r, r.choice(["int8", "uint8", "float8e5m2", "int4", None]), kind),  # type: ignore[arg-type]
        weight=rarely(r, r.choice(["int8", "int4", "uint8", "uint4", "float8e4m3fn", None]), kind),  # type: ignore[arg-type]
        weight_axis=rarely(r, r.choice([0, 1]), None),  # type: ignore[arg-type]
        per_channel=r.random() < 0.7,
        activation_axis=rarely(r, r.choice([0, 1]), None),  # type: ignore[arg-type]
        zero_point=0 if r.random() < 0.96 else 1,
        body=body,
        scale_type=rarely(r, FLOAT, body),  # type: ignore[arg-type]
        int32_bias=r.random() < 0.03,
        explicit_zero_point=r.random() < 0.8,
        opset=r.choice([19, 21, 21, 23, 25, 17, 13, 26]),
    )
    return single(_shaped(r, form))


def focused(r: Random) -> onnx.ModelProto:
    """A legal operator with at most one thing changed."""
    kind = r.choice(["int8", "float8e4m3fn"])
    op = r.choice(["Conv", "Conv", "MatMul", "Gemm"])
    form = Form(op, kind, kind, per_channel=r.random() < 0.7, opset=r.choice([19, 21, 23, 25]))
    changes: list[dict[str, object]] = [{}, {"weight_axis": r.choice([0, 1])}, {"activation_axis": r.choice([0, 1])}]
    changes += [{"weight": None}, {"activation": None}, {"scale_type": FLOAT, "body": FLOAT}, {"explicit_zero_point": False}]
    kernels = [(r.choice([1, 2, 3]), r.choice([1, 3, 16, 17, 33])), r.choice([(5, 6), (6, 6), (7, 7)])]
    images: list[dict[str, object]] = [{"x_dims": (1, 8, 9, 33), "w_dims": (32, 8, *k)} for k in kernels]
    sizes: list[dict[str, object]] = [{"size": (r.choice([1, 3, 64, 65]), r.choice([1, 2, 31, 64]))}, {"trans_b": op == "Gemm"}]
    return single(form.but(**r.choice([*changes, *(images * 2 if op == "Conv" else sizes)])))


def _shaped(r: Random, form: Form) -> Form:
    if form.op == "Conv":
        taps = r.choice([(1, 1), (3, 3), (3, 3), (5, 5), (7, 7), (1, 9), (6, 6), (1, 3)])
        taps = r.choice([taps, (7, 7), (1, 33)]) if form.activation == form.weight == "float8e4m3fn" else taps
        channels, groups = r.choice([(32, 1), (3, 1), (16, 1), (32, 32), (32, 4), (15, 1)])
        x, w = (1, channels, 9, 9 if taps[1] < 9 else 33), (32, channels // groups, *taps)
        return form.but(groups=groups, x_dims=x, w_dims=w, weight_q=r.random() < 0.2 and form.weight != "int4")
    if form.op == "ConvTranspose":
        return form
    form = form.but(size=r.choice([(64, 32), (64, 32), (128, 32), (7, 5), (16, 2), (96, 48)]))
    form = form.but(block=r.choice([0, 0, 0, 16, 32, 64]), block_axis=r.choice([0, 0, 1]))
    if form.op == "Gemm":
        return form.but(trans_b=r.random() < 0.5)
    if form.block:
        return form
    layout = r.choice(["plain", "plain", "transposed", "left"])
    return form.but(transposed_weight=layout == "transposed", left=layout == "left")


def attended(r: Random) -> onnx.ModelProto:
    """An attention block with some of its tensors quantized."""
    quantized = r.choice(["qksv", "qksv", "", "qk", "sv", "v", "qkv", "q"])
    kind = r.choice(["int8", "float8e4m3fn"])
    form = AttentionForm(
        frozenset({"softmax" if p == "s" else p for p in quantized}),
        packed=r.random() < 0.2,
        scores=r.random() < 0.15,
        softmax_scale=r.choice([1 / 127, 1 / 448, 0.01]),
        kind=kind,
        scale_at=r.choice(["scores", "q", "k"]),
        late_transpose=r.random() < 0.3,
        mask=r.random() < 0.4,
    )
    return attention(form, opset=r.choice([19, 21, 23]))


def joined(r: Random) -> onnx.ModelProto:
    """Concat, duplicate quantizers and residuals."""
    make = r.choice(["concat", "concat", "two", "residual", "between"])
    scales = (0.05, r.choice([0.05, 0.2]))
    if make == "concat":
        return formats.concatenated(scales, outer=r.random() < 0.4)
    if make == "two":
        return formats.two_quantizers(scales)
    if make == "residual":
        return formats.residual(r.choice(["float", "shared", "own"]))
    return formats.between(r.choice(["Transpose", "Relu", "Softmax", "Sigmoid", "Tanh"]))


def blocked(r: Random) -> onnx.ModelProto:
    """NVFP4, MXFP8 and int4 blocks."""
    make = r.choice(["nvfp4", "nvfp4", "mxfp8", "int4", "int4", "int4"])
    if make == "nvfp4":
        k = r.choice([64, 32, 48, 16, 128, 40])
        axis = 1 if r.random() < 0.15 else 0
        return formats.nvfp4(k if axis == 0 else 64, axis, opset=r.choice([21, 23, 25]), dynamic=r.random() < 0.85)
    if make == "mxfp8":
        return formats.mxfp8(r.choice([64, 128]))
    size, block = r.choice([(64, 32), (256, 64), (96, 48), (80, 16), (128, 32)]), r.choice([0, 16, 32, 64, 128, 256])
    return single(Form(op=r.choice(["MatMul", "Gemm"]), activation=None, weight="int4", size=size, block=block))


@dataclass
class Flow:
    """The tensor that a chain has reached."""

    name: str
    dims: list[int]


def chain(r: Random) -> onnx.ModelProto:
    """Two to four linear layers or convolutions with other operators, residuals and random Q/DQ between them."""
    b, form = Builder(), Form(opset=r.choice([19, 21, 23]))
    image = r.random() < 0.5
    flow = Flow("x", [1, 16, 8, 8] if image else [2, 8, 32])
    kind = r.choice(["int8", "int8", "float8e4m3fn"])
    for i in range(r.randint(2, 4)):
        flow = _layer(b, r, flow, i, kind, image)
        flow = _glue(b, r, flow, i, image)
    b.node("Identity", [flow.name], "y")
    return b.model([("x", HALF, [1, 16, 8, 8] if image else [2, 8, 32])], [("y", form.body)], form.opset)


def _layer(b: Builder, r: Random, flow: Flow, i: int, kind: str, image: bool) -> Flow:
    x = flow.name
    if r.random() < 0.85:
        x = _pair(b, x, r.uniform(0.02, 0.2), kind)
        x = b.node("Identity", [x], f"id{i}") if r.random() < 0.1 else x
    w = _constant(b, r, f"w{i}", _weight_dims(flow, image, r), kind, image)
    attributes = {"pads": [1, 1, 1, 1]} if image else {}
    linear = b.node("Conv" if image else "MatMul", [x, w], f"lin{i}", **attributes)
    if image and r.random() < 0.3 and flow.name != "x":
        linear = b.node("Add", [linear, flow.name], f"skip{i}")
    if not image:
        linear = b.node("Add", [linear, b.tensor(f"b{i}", HALF, [flow.dims[-1]], 0.1)], f"biased{i}")
    return Flow(linear, flow.dims)


def _weight_dims(flow: Flow, image: bool, r: Random) -> list[int]:
    return [16, 16, 3, 3] if image else [flow.dims[-1], flow.dims[-1]]


def _pair(b: Builder, x: str, scale: float, kind: str) -> str:
    s, z = b.tensor(f"{x}_s", HALF, [], scale), b.tensor(f"{x}_z", TYPES[kind], [], 0)
    return b.node("DequantizeLinear", [b.node("QuantizeLinear", [x, s, z], f"{x}_q"), s, z], f"{x}_dq")


def _constant(b: Builder, r: Random, name: str, dims: Sequence[int], kind: str, image: bool) -> str:
    if r.random() < 0.12:
        return b.tensor(name, HALF, dims, np.random.default_rng(0).normal(size=tuple(dims)) * 0.1)
    other = r.random() < 0.1
    axis = (0 if image else 1) if not other else (1 if image else 0)
    per_channel = r.random() < 0.7
    codes = b.tensor(f"{name}_codes", TYPES[kind], dims, np.random.default_rng(0).integers(-7, 8, size=tuple(dims)))
    scale = b.tensor(f"{name}_s", HALF, [dims[axis]] if per_channel else [], 0.01)
    return b.node("DequantizeLinear", [codes, scale], f"{name}_dq", **({"axis": axis} if per_channel else {}))


def _glue(b: Builder, r: Random, flow: Flow, i: int, image: bool) -> Flow:
    step = r.choice(["none", "Relu", "Sigmoid", "move", "quantized", "Softmax" if not image else "MaxPool", "Mul"])
    if step in ("Relu", "Sigmoid", "Softmax"):
        return Flow(b.node(step, [flow.name], f"g{i}"), flow.dims)
    if step == "Mul":
        return Flow(b.node("Mul", [flow.name, b.tensor(f"m{i}", HALF, [], 0.5)], f"g{i}"), flow.dims)
    if step == "MaxPool":
        pooled = b.node("MaxPool", [flow.name], f"g{i}", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        return Flow(pooled, flow.dims)
    if step == "quantized":  # a pair of its own, and data movement behind it
        quantized = _pair(b, flow.name, 0.07, r.choice(["int8", "float8e4m3fn"]))
        return Flow(b.node("Relu", [quantized], f"g{i}"), flow.dims)
    if step == "move":
        perm = [0, 1, 3, 2] if image else [1, 0, 2]
        turned = b.node("Transpose", [flow.name], f"g{i}", perm=perm)
        return Flow(b.node("Transpose", [turned], f"gg{i}", perm=perm), flow.dims)
    return flow


def fixed_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its symbolic axes set to 2, so that no profile is needed."""
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.CopyFrom(helper.make_tensor_value_info("t", HALF, [2]).type.tensor_type.shape.dim[0])
    return model
