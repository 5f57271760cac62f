"""Small transformers with one residual stream: grouped heads, biases, tied embeddings, LayerScale, and the forms that refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper
from onnx_ir.passes.common import ShapeInferencePass

from qcompile.ir.model import Model

node = helper.make_node
C, HEADS, KV, DIM, HIDDEN, TOKENS, VOCAB = 32, 4, 2, 8, 64, 6, 20


def feeds(samples: int = 6, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Token numbers [samples, TOKENS] and a condition [samples, C]."""
    rng = np.random.default_rng(seed)
    return {"ids": rng.integers(0, VOCAB, (samples, TOKENS)), "t": rng.standard_normal((samples, 1, C)).astype(np.float32)}


def constants(kv: int = KV) -> dict[str, NDArray[Any]]:
    """Weights of one block with `kv` key-value heads; three channels of the embedding are outliers."""
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {
        "table": (VOCAB, C),
        "pos": (1, TOKENS, C),
        "g": (C,),
        "b": (C,),
        "g2": (C,),
        "b2": (C,),
    }
    shapes |= {"gf": (C,), "bf": (C,), "wq": (C, HEADS * DIM), "bq": (HEADS * DIM,), "wo": (HEADS * DIM, C), "bo": (C,)}
    shapes |= {f"{n}{p}": s for p in "kv" for n, s in (("w", (C, kv * DIM)), ("b", (kv * DIM,)))}
    shapes |= {"w1": (C, HIDDEN), "c1": (HIDDEN,), "w2": (HIDDEN, C), "c2": (C,), "scale": (C,)}
    made: dict[str, NDArray[Any]] = {n: (rng.standard_normal(s) * 0.3).astype(np.float32) for n, s in shapes.items()}
    made["table"][:, :3] *= 20
    made |= {
        "by_q": np.array([0, 0, HEADS, DIM]),
        "by_kv": np.array([0, 0, kv, 1, DIM]),
        "ones": np.array([1, 1, 1, HEADS // kv, 1]),
    }
    made |= {"grouped": np.array([0, TOKENS, HEADS, DIM]), "merged": np.array([0, 0, C]), "root": np.array(DIM**-0.5, np.float32)}
    made |= {"eps": np.array(1e-5, np.float32), "two": np.array(2, np.float32)}
    made |= {"zero": np.array([0]), "middle": np.array([C // 2]), "last": np.array([-1])}
    return made


def _heads(part: str) -> list[onnx.NodeProto]:
    """[N, T, KV * DIM] -> [N, HEADS, T, DIM], every key-value head for two query heads."""
    return [
        node("Reshape", [f"a{part}", "by_kv"], [f"{part}5"], name=f"{part}_split"),
        node("Tile", [f"{part}5", "ones"], [f"{part}6"], name=f"{part}_repeat"),
        node("Reshape", [f"{part}6", "grouped"], [f"{part}7"], name=f"{part}_group"),
        node("Transpose", [f"{part}7"], [f"{part}8"], name=f"{part}_heads", perm=[0, 2, 1, 3]),
    ]


def _projection(part: str) -> list[onnx.NodeProto]:
    return [
        node("MatMul", ["n1", f"w{part}"], [f"m{part}"], name=part),
        node("Add", [f"m{part}", f"b{part}"], [f"a{part}"], name=f"{part}_bias"),
    ]


def _norm(kind: str, x: str, out: str, suffix: str, name: str) -> list[onnx.NodeProto]:
    if kind == "layer":
        return [node("LayerNormalization", [x, f"g{suffix}", f"b{suffix}"], [out], name=name)]
    return [
        node("Pow", [x, "two"], [f"{out}_p"], name=f"{name}_square"),
        node("ReduceMean", [f"{out}_p"], [f"{out}_m"], name=f"{name}_mean", axes=[-1]),
        node("Add", [f"{out}_m", "eps"], [f"{out}_e"], name=f"{name}_eps"),
        node("Sqrt", [f"{out}_e"], [f"{out}_r"], name=f"{name}_root"),
        node("Div", [x, f"{out}_r"], [f"{out}_n"], name=f"{name}_divide"),
        node("Mul", [f"{out}_n", f"g{suffix}"], [out], name=name),
    ]


def block(kind: str = "layer", form: str = "plain", weights: Mapping[str, NDArray[Any]] | None = None, kv: int = KV) -> Model:
    """Embedding + positions -> attention and MLP with a pre-norm each -> final norm -> the embedding again as head.

    form: plain; layer-scale; ada-ln (the norm's output is scaled by `t`); relu, stream-scale (on the stream); gate (a branch
    times `t`); part (half of the stream is read); output (the stream is returned); post-norm; cache (the values are returned).
    """
    nodes = [
        node("Gather", ["table", "ids"], ["e"], name="embed"),
        node("Add", ["e", "pos"], ["s0"], name="positions"),
        *_norm(kind, "s0", "n1", "", "norm1"),
        *(x for p in "qkv" for x in _projection(p)),
        node("Reshape", ["aq", "by_q"], ["q7"], name="q_split"),
        node("Transpose", ["q7"], ["q8"], name="q_heads", perm=[0, 2, 1, 3]),
        *_heads("k"),
        *_heads("v"),
        node("Transpose", ["k8"], ["kt"], name="k_t", perm=[0, 1, 3, 2]),
        node("MatMul", ["q8", "kt"], ["sc"], name="scores"),
        node("Mul", ["sc", "root"], ["ss"], name="scale"),
        node("Softmax", ["ss"], ["p"], name="softmax", axis=-1),
        node("MatMul", ["p", "v8"], ["o"], name="pv"),
        node("Transpose", ["o"], ["ot"], name="merge", perm=[0, 2, 1, 3]),
        node("Reshape", ["ot", "merged"], ["om"], name="merge_heads"),
        node("MatMul", ["om", "wo"], ["mo"], name="out"),
        node("Add", ["mo", "bo"], ["ao"], name="out_bias"),
        *_join(form),
        *_norm(kind, "s1", "n2", "2", "norm2"),
        *([node("Mul", ["n2", "t"], ["n3"], name="modulate")] if form == "ada-ln" else []),
        node("MatMul", ["n3" if form == "ada-ln" else "n2", "w1"], ["m1"], name="fc1"),
        node("Add", ["m1", "c1"], ["h1"], name="fc1_bias"),
        node("Relu", ["h1"], ["h2"], name="act"),
        node("MatMul", ["h2", "w2"], ["m2"], name="fc2"),
        node("Add", ["m2", "c2"], ["h3"], name="fc2_bias"),
        node("Add", ["n2" if form == "post-norm" else "s1", "h3"], ["s2"], name="residual2"),
        *_norm(kind, "s2", "nf", "f", "final"),
        node("Transpose", ["table"], ["head_w"], name="tied", perm=[1, 0]),
        node("MatMul", ["nf", "head_w"], ["y"], name="head"),
    ]
    outs = {"output": ["y", "s2"], "cache": ["y", "v8"], "part": ["y", "half"]}.get(form, ["y"])
    nodes += [node("Slice", ["s2", "zero", "middle", "last"], ["half"], name="half_of_it")] if form == "part" else []
    return _model(nodes, dict(weights or constants(kv)), outs)


def _join(form: str) -> list[onnx.NodeProto]:
    """The attention's output into the stream."""
    if form == "layer-scale":
        return [node("Mul", ["ao", "scale"], ["al"], name="layer_scale"), node("Add", ["s0", "al"], ["s1"], name="residual1")]
    if form == "gate":
        return [node("Mul", ["ao", "t"], ["al"], name="gate"), node("Add", ["s0", "al"], ["s1"], name="residual1")]
    if form == "stream-scale":
        return [node("Add", ["s0", "ao"], ["sr"], name="residual1"), node("Mul", ["sr", "scale"], ["s1"], name="on_stream")]
    if form == "relu":
        return [node("Add", ["s0", "ao"], ["sr"], name="residual1"), node("Relu", ["sr"], ["s1"], name="on_stream")]
    return [node("Add", ["s0", "ao"], ["s1"], name="residual1")]


def _model(nodes: list[onnx.NodeProto], weights: dict[str, NDArray[Any]], outs: list[str]) -> Model:
    read = {n for x in nodes for n in x.input}
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in outs]
    inputs = [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["N", TOKENS])]
    inputs += [helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, ["N", 1, C])]
    held = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in weights.items() if n in read]
    graph = helper.make_graph(nodes, "g", inputs, ends, held)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    model = Model.from_proto(onnx.shape_inference.infer_shapes(proto))
    ShapeInferencePass()(model.ir)
    return model
