"""Finders take linear time: a generated transformer of 20,000 nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile import structure as match

DIM, HEADS, HEAD, TOKENS = 8, 2, 4, 5


def block(i: int) -> Iterator[onnx.NodeProto]:
    """One pre-norm block: decomposed LayerNorm, packed qkv by Split, erf GELU; 39 nodes."""

    def node(op: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
        names = [name if name.startswith("w_") else f"{i}_{name}" for name in inputs.split()]
        names = [f"{i - 1}_out" if name == f"{i}_in" else name for name in names]
        outputs = [f"{i}_{name}" for name in output.split()]
        return helper.make_node(op, names, outputs, f"{op}_{i}_{output}", **attributes)

    for source, name in (("in", "a"), ("mid", "b")):
        yield node("ReduceMean", source, f"{name}mean", axes=[-1])
        yield node("Sub", f"{source} {name}mean", f"{name}sub")
        yield node("Pow", f"{name}sub w_two", f"{name}sq")
        yield node("ReduceMean", f"{name}sq", f"{name}var", axes=[-1])
        yield node("Add", f"{name}var w_eps", f"{name}vareps")
        yield node("Sqrt", f"{name}vareps", f"{name}std")
        yield node("Div", f"{name}sub {name}std", f"{name}hat")
        yield node("Mul", f"{name}hat w_gamma", f"{name}mul")
        yield node("Add", f"{name}mul w_beta", f"{name}norm")
        if name == "a":
            yield from attention(node)
    yield node("MatMul", "bnorm w_fc1", "fc1mm")
    yield node("Add", "w_fc1b fc1mm", "fc1")
    yield node("Div", "fc1 w_sqrt2", "z")
    yield node("Erf", "z", "erf")
    yield node("Add", "erf w_one", "erf1")
    yield node("Mul", "fc1 erf1", "xerf")
    yield node("Mul", "xerf w_half", "gelu")
    yield node("MatMul", "gelu w_fc2", "fc2mm")
    yield node("Add", "fc2mm w_beta", "fc2")
    yield node("Add", "mid fc2", "out")


def attention(node: object) -> Iterator[onnx.NodeProto]:
    assert callable(node)
    yield node("MatMul", "anorm w_qkv", "qkvmm")
    yield node("Add", "w_qkvb qkvmm", "qkv")
    yield node("Reshape", "qkv w_heads", "heads")
    yield node("Transpose", "heads", "parts", perm=[2, 0, 3, 1, 4])
    yield node("Split", "parts", "q1 k1 v1", axis=0)
    for part in "qkv":
        yield node("Squeeze", f"{part}1 w_zero", part)
    yield node("Transpose", "k", "kt", perm=[0, 1, 3, 2])
    yield node("MatMul", "q kt", "scores")
    yield node("Mul", "scores w_half", "scaled")
    yield node("Softmax", "scaled", "p", axis=-1)
    yield node("MatMul", "p v", "pv")
    yield node("Transpose", "pv", "merged", perm=[0, 2, 1, 3])
    yield node("Reshape", "merged w_flat", "context")
    yield node("MatMul", "context w_proj", "projmm")
    yield node("Add", "projmm w_beta", "proj")
    yield node("Add", "in proj", "mid")


def transformer(blocks: int) -> ir.Graph:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "w_two": np.float32(2),
        "w_eps": np.float32(1e-5),
        "w_sqrt2": np.float32(2**0.5),
        "w_one": np.float32(1),
        "w_half": np.float32(0.5),
        "w_zero": np.array([0]),
        "w_heads": np.array([0, 0, 3, HEADS, HEAD]),
        "w_flat": np.array([0, 0, DIM]),
    }
    shapes = {"w_gamma": (DIM,), "w_beta": (DIM,), "w_qkv": (DIM, 3 * DIM), "w_qkvb": (3 * DIM,), "w_proj": (DIM, DIM)}
    shapes |= {"w_fc1": (DIM, 2 * DIM), "w_fc1b": (2 * DIM,), "w_fc2": (2 * DIM, DIM)}
    arrays |= {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    initializers = [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()]
    nodes = [n for i in range(blocks) for n in block(i)]
    x = helper.make_tensor_value_info("-1_out", TensorProto.FLOAT, [2, TOKENS, DIM])
    y = helper.make_tensor_value_info(f"{blocks - 1}_out", TensorProto.FLOAT, [2, TOKENS, DIM])
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    return ir.from_proto(onnx.shape_inference.infer_shapes(model)).graph


COUNTS = {
    "find_linears": 4, "find_norms": 2, "find_norm_to_linears": 2, "find_activations": 1, "find_mlps": 1, "find_attentions": 1,
    "find_v_projections": 1, "find_residual_streams": 0, "find_conv_chains": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def large() -> ir.Graph:
    return transformer(450)


@pytest.mark.parametrize("finder", COUNTS)
def test_finds_everything_in_a_large_graph(large: ir.Graph, finder: str) -> None:
    found = getattr(match, finder)(large)
    blocks = len(large) // 46
    assert (len(found), len(found.refused)) == (1 if finder == "find_residual_streams" else COUNTS[finder] * blocks, 0)


@pytest.fixture(scope="module")
def small_and_medium() -> tuple[ir.Graph, ir.Graph]:
    return transformer(15), transformer(120)


@pytest.mark.parametrize("finder", COUNTS)
def test_time_grows_linearly(small_and_medium: tuple[ir.Graph, ir.Graph], finder: str) -> None:
    fast, slow = (seconds(getattr(match, finder), graph) for graph in small_and_medium)
    assert slow < 24 * fast + 0.05


def seconds(find: Callable[[ir.Graph], object], graph: ir.Graph) -> float:
    times: list[float] = []
    for _ in range(2):
        start = time.process_time()
        find(graph)
        times.append(time.process_time() - start)
    return min(times)
