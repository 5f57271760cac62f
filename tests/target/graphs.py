"""Tiny Q/DQ graphs: one weighted operator (or one attention block) with every knob of the behaviour matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

TYPES = {
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
    "int16": TensorProto.INT16,
    "uint16": TensorProto.UINT16,
    "float8e4m3fn": TensorProto.FLOAT8E4M3FN,
    "float8e5m2": TensorProto.FLOAT8E5M2,
    "int32": TensorProto.INT32,
}


@dataclass(frozen=True)
class Form:
    """How the one operator is quantized; the defaults are legal everywhere."""

    op: str = "Conv"
    activation: str | None = "int8"
    weight: str | None = "int8"
    weight_axis: int | None = None
    per_channel: bool = True
    activation_axis: int | None = None
    zero_point: int = 0
    scale: float = 0.05
    scale_type: int = TensorProto.FLOAT16
    body: int = TensorProto.FLOAT16
    int32_bias: bool = False
    trans_b: bool = False
    transposed_weight: bool = False
    groups: int = 1
    left: bool = False
    weight_q: bool = False
    one_scale: bool = False
    size: tuple[int, int] = (64, 32)
    x_dims: tuple[int, ...] = ()
    w_dims: tuple[int, ...] = ()
    block: int = 0
    block_axis: int = 0
    explicit_zero_point: bool = True
    computed_scale: bool = False
    opset: int = 21

    def but(self, **changes: object) -> Form:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


SHAPES = {
    "Conv": ([1, 32, 8, 8], [32, 32, 3, 3]),
    "ConvTranspose": ([1, 32, 8, 8], [32, 32, 2, 2]),
}
AXES = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}


class Builder:
    """Collects nodes and initializers of one graph."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []

    def tensor(self, name: str, kind: int, dims: Sequence[int], values: object) -> str:
        flat = np.broadcast_to(np.asarray(values, dtype=np.float64), tuple(dims)).reshape(-1)
        typed = numpy_helper.to_array(helper.make_tensor(name, kind, list(dims), flat.tolist()))
        self.initializers.append(numpy_helper.from_array(typed, name))  # raw data, as exporters write it
        return name

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=f"n_{output}", **attributes))
        return output

    def quantize(self, x: str, form: Form, kind: str, scale: float | None = None, dims: Sequence[int] = ()) -> str:
        """x -> Q -> DQ, named `n_<x>_q` and `n_<x>_dq`."""
        axis = {} if not dims else {"axis": form.activation_axis}
        s = self.tensor(f"{x}_s", form.scale_type, dims, form.scale if scale is None else scale)
        if form.computed_scale:
            s = self.node("Abs", [s], f"{x}_s2") if dims else self.node("ReduceMax", [x], f"{x}_s2", keepdims=0)
        if not form.explicit_zero_point:
            self.node("QuantizeLinear", [x, s], f"{x}_q", output_dtype=TYPES[kind], **axis)
            return self.node("DequantizeLinear", [f"{x}_q", s], f"{x}_dq", **axis)
        z = self.tensor(f"{x}_z", TYPES[kind], dims, form.zero_point)
        self.node("QuantizeLinear", [x, s, z], f"{x}_q", **axis)
        return self.node("DequantizeLinear", [f"{x}_q", s, z], f"{x}_dq", **axis)

    def model(
        self, inputs: Sequence[tuple[str, int, Sequence[object]]], outputs: Sequence[tuple[str, int]], opset: int
    ) -> onnx.ModelProto:
        """Checks nothing: some of these graphs are wrong on purpose."""
        ins = [helper.make_tensor_value_info(n, t, list(d)) for n, t, d in inputs]
        outs = [helper.make_tensor_value_info(n, t, None) for n, t in outputs]
        graph = helper.make_graph(self.nodes, "tiny", ins, outs, self.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def single(form: Form) -> onnx.ModelProto:
    """x -> [Q -> DQ] -> op(., [DQ] W, b) -> y."""
    b = Builder()
    x_dims, w_dims = _dims(form)
    x = "x"
    if form.activation is not None:
        dims = () if form.activation_axis is None else (x_dims[form.activation_axis],)
        x = b.quantize("x", form, form.activation, dims=dims)
    inputs = [_weight(b, form, w_dims), x] if form.left else [x, _weight(b, form, w_dims)]
    if form.op != "MatMul":
        inputs.append(_bias(b, form))
    b.node(form.op, inputs, "y", **_attributes(form))
    return b.model([("x", form.body, x_dims)], [("y", form.body)], form.opset)


def _dims(form: Form) -> tuple[list[int], list[int]]:
    """Shapes of the activation and of the weight as the operator reads it."""
    if form.op in ("MatMul", "Gemm"):
        k, n = form.size
        return [k, 4] if form.left else [4, k], [n, k] if form.trans_b or form.left else [k, n]
    x, w = SHAPES[form.op]
    return list(form.x_dims or x), list(form.w_dims or (w[0], w[1] // form.groups, *w[2:]))


def _attributes(form: Form) -> dict[str, object]:
    chosen: dict[str, object] = {"transB": 1} if form.trans_b else {}
    chosen |= {"strides": [2, 2]} if form.op == "ConvTranspose" else {}
    return chosen | ({"group": form.groups} if form.groups > 1 else {})


def _weight(b: Builder, form: Form, dims: Sequence[int]) -> str:
    """The weight behind its DequantizeLinear, stored transposed and turned back if the form says so."""
    rng = np.random.default_rng(0)
    if form.weight is None:
        return b.tensor("w", form.body, dims, rng.normal(size=dims) * 0.1)
    stored = dims[::-1] if form.transposed_weight else dims
    default = 0 if form.trans_b else AXES.get(form.op, 1)
    axis = default if form.weight_axis is None else form.weight_axis
    scale_dims, attributes = _weight_scales(form, stored, axis)
    scale = b.tensor("w_s", form.scale_type, scale_dims, rng.uniform(0.005, 0.02, size=scale_dims))
    if form.weight_q:
        zero = b.tensor("w_z", TYPES[form.weight], scale_dims, 0)
        values = b.tensor("w", form.body, stored, rng.normal(size=stored) * 0.1)
        codes = b.node("QuantizeLinear", [values, scale, zero], "w_q", **attributes)
    else:
        codes = b.tensor("w_codes", TYPES[form.weight], stored, rng.integers(0, 8, size=stored))
    w = b.node("DequantizeLinear", [codes, scale], "w_dq", **attributes)
    return b.node("Transpose", [w], "w_t", perm=[1, 0]) if form.transposed_weight else w


def _weight_scales(form: Form, dims: Sequence[int], axis: int) -> tuple[Sequence[int], dict[str, int]]:
    if form.block:
        blocks = [-(-d // form.block) if i == form.block_axis else d for i, d in enumerate(dims)]
        return blocks, {"axis": form.block_axis, "block_size": form.block}
    if form.one_scale:
        return [1], {"axis": axis}
    return ([dims[axis]], {"axis": axis}) if form.per_channel else ([], {})


def _bias(b: Builder, form: Form) -> str:
    channels = form.size[1] if form.op == "Gemm" else 32
    if not form.int32_bias:
        return b.tensor("b", form.body, [channels], 0.1)
    scale = b.tensor("b_s", form.scale_type, [], 0.0005)
    return b.node("DequantizeLinear", [b.tensor("b_codes", TYPES["int32"], [channels], 7), scale], "b_dq")


@dataclass(frozen=True)
class AttentionForm:
    """Which tensors of an attention block are quantized."""

    quantized: frozenset[str] = frozenset({"q", "k", "softmax", "v"})
    packed: bool = False
    scores: bool = False
    softmax_scale: float = 1 / 127
    kind: str = "int8"
    scale_at: str = "scores"
    late_transpose: bool = False
    mask: bool = False
    tokens: int | str = 64
    head: int = 32
    output: bool = True
    guard: bool = False
    softcap: bool = False

    @property
    def width(self) -> int:
        return 4 * self.head


def attention(form: AttentionForm = AttentionForm(), opset: int = 21, batch: int | str = "n") -> onnx.ModelProto:
    """x [n, tokens, 4 * head] -> q, k, v projections -> 4 heads -> output projection, in float16."""
    b, base, half, width = Builder(), Form(), TensorProto.FLOAT16, form.width
    x = b.quantize("x", base, form.kind)
    parts = _packed(b, x, form) if form.packed else {p: _projected(b, x, p, form) for p in "qkv"}
    ready = {p: _head(b, form, p, name) for p, name in parts.items()}
    scores = b.node("MatMul", [ready["q"], ready["k"]], "scores")
    if form.scale_at == "scores":
        scores = b.node("Mul", [scores, b.tensor("scaling", half, [], 0.125)], "scaled")
    scores = b.node("Tanh", [scores], "capped") if form.softcap else scores
    scores = b.node("Add", [scores, b.tensor("mask", half, [64, 64], -1)], "masked") if form.mask else scores
    scores = b.quantize(scores, base, form.kind) if form.scores else scores
    probabilities = b.node("Softmax", [scores], "p", axis=-1)
    if form.guard:
        nan = b.node("IsNaN", [probabilities], "nan")
        probabilities = b.node("Where", [nan, b.tensor("nothing", half, [], 0), probabilities], "p_guarded")
    if "softmax" in form.quantized:
        probabilities = b.quantize(probabilities, base, form.kind, scale=form.softmax_scale)
    out = b.node("Transpose", [b.node("MatMul", [probabilities, ready["v"]], "o")], "o_t", perm=[0, 2, 1, 3])
    merged = b.node("Reshape", [out, _shape(b, "merge", [0, 0, width])], "merged")
    if form.output:
        b.node("MatMul", [b.quantize(merged, base, form.kind), _codes(b, "w_out", [width, width], form.kind)], "y")
    else:
        b.node("MatMul", [merged, b.tensor("w_out", half, [width, width], 0.01)], "y")
    return b.model([("x", half, [batch, form.tokens, width])], [("y", half)], opset)


def _head(b: Builder, form: AttentionForm, part: str, name: str) -> str:
    """One of q, k, v in heads, scaled and quantized as the form says."""
    late = part == "k" and form.late_transpose
    perm = [0, 2, 3, 1] if part == "k" and not late else [0, 2, 1, 3]
    head = b.node("Transpose", [name], f"{part}_t", perm=perm)
    if part == form.scale_at:
        head = b.node("Mul", [head, b.tensor("scaling", TensorProto.FLOAT16, [], 0.125)], f"{part}_scaled")
    head = b.quantize(head, Form(), form.kind) if part in form.quantized else head
    return b.node("Transpose", [head], f"{part}_late", perm=[0, 1, 3, 2]) if late else head


def _projected(b: Builder, x: str, part: str, form: AttentionForm) -> str:
    linear = b.node("MatMul", [x, _codes(b, f"w_{part}", [form.width, form.width], form.kind)], f"{part}_lin")
    biased = b.node("Add", [linear, b.tensor(f"b_{part}", TensorProto.FLOAT16, [form.width], 0.1)], f"{part}_b")
    return b.node("Reshape", [biased, _shape(b, f"shape_{part}", [0, 0, 4, form.head])], f"{part}_h")


def _packed(b: Builder, x: str, form: AttentionForm) -> dict[str, str]:
    linear = b.node("MatMul", [x, _codes(b, "w_qkv", [128, 384], form.kind)], "qkv")
    biased = b.node("Add", [linear, b.tensor("b_qkv", TensorProto.FLOAT16, [384], 0.1)], "qkv_b")
    cut = b.node("Reshape", [biased, _shape(b, "cut", [0, 0, 3, 4, 32])], "cut_r")
    b.nodes.append(helper.make_node("Split", [cut], ["q_5", "k_5", "v_5"], name="n_split", axis=2, num_outputs=3))
    two = _shape(b, "two", [2])
    return {p: b.node("Squeeze", [f"{p}_5", two], f"{p}_h") for p in "qkv"}


def _codes(b: Builder, name: str, dims: Sequence[int], kind: str = "int8") -> str:
    codes = b.tensor(f"{name}_codes", TYPES[kind], dims, np.random.default_rng(1).integers(-127, 128, size=dims))
    return b.node(
        "DequantizeLinear",
        [codes, b.tensor(f"{name}_s", TensorProto.FLOAT16, [dims[-1]], 0.01)],
        f"{name}_dq",
        axis=len(dims) - 1,
    )


def _shape(b: Builder, name: str, values: Sequence[int]) -> str:
    b.initializers.append(numpy_helper.from_array(np.array(values, dtype=np.int64), name))
    return name
