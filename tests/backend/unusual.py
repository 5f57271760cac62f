"""Models whose engines hold more than plain kernels: recurrent layers, loops, branches, sizes used as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from onnx import helper as h
from onnx import numpy_helper as nh

SIZE = 64
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.125).astype(np.float32)


def info(name: str, shape: Sequence[int | str] | None, kind: int = TensorProto.FLOAT) -> ValueInfoProto:
    return h.make_tensor_value_info(name, kind, shape)


def node(op: str, inputs: str, outputs: str, name: str = "", **attrs: Any) -> NodeProto:
    return h.make_node(op, inputs.split(" "), outputs.split(" "), name or f"{op}_{outputs.split(' ')[0]}", **attrs)


def model(nodes: list[NodeProto], ins: list[ValueInfoProto], outs: list[ValueInfoProto], **constants: Any) -> ModelProto:
    stored = [nh.from_array(np.asarray(v), k) for k, v in constants.items()]
    made = h.make_model(h.make_graph(nodes, "g", ins, outs, stored), opset_imports=[h.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(made)
    return made


def recurrent(op: str = "LSTM", gates: int = 4, length: int | str = 12) -> ModelProto:
    hidden = 32
    nodes = [
        node("Transpose", "x", "xt", perm=[1, 0, 2]),
        node(op, "xt W R B", "ys yh", op, hidden_size=hidden),
        node("Squeeze", "yh zero", "last"),
        node("MatMul", "last wo", "y", "out"),
    ]
    weights = {"W": normal(1, gates * hidden, SIZE), "R": normal(1, gates * hidden, hidden), "B": normal(1, 2 * gates * hidden)}
    return model(
        nodes, [info("x", ["N", length, SIZE])], [info("y", ["N", SIZE])], **weights, zero=np.array([0]), wo=normal(hidden, SIZE)
    )


def _step(inner: str, outputs: str) -> GraphProto:
    nodes = [node("MatMul", "h w", "m", inner), node("Tanh", "m", "h2", "tanh"), node("Identity", "c", "c2", "go on")]
    nodes += [node("Identity", "h2", "o", "collect")] if outputs else []
    ins = [info("i", [], TensorProto.INT64), info("c", [], TensorProto.BOOL), info("h", ["N", SIZE])]
    outs = [info("c2", [], TensorProto.BOOL), info("h2", ["N", SIZE])] + ([info("o", ["N", SIZE])] if outputs else [])
    return h.make_graph(nodes, "step", ins, outs)


def loop(inner: str = "inner") -> ModelProto:
    """A Loop of as many steps as the sequence is long."""
    nodes = [
        node("Shape", "x", "shape"),
        node("Gather", "shape one", "count"),
        node("ReduceMean", "x axis", "h0", keepdims=0),
        node("Loop", "count yes h0", "hl hs", "loop", body=_step(inner, "o")),
        node("MatMul", "hl w", "last", "last"),
        node("MatMul", "hs w", "all", "all"),
    ]
    return model(
        nodes,
        [info("x", ["N", "L", SIZE])],
        [info("last", ["N", SIZE]), info("all", ["L", "N", SIZE])],
        w=normal(SIZE, SIZE), one=np.int64(1), axis=np.array([1]), yes=np.array(True),
    )  # fmt: skip


def scan() -> ModelProto:
    body = h.make_graph(
        [
            node("Concat", "h xi", "hx", "join", axis=1),
            node("MatMul", "hx w", "m", "inner"),
            node("Tanh", "m", "h2", "tanh"),
            node("Identity", "h2", "o", "collect"),
        ],
        "step",
        [info("h", [4, 32]), info("xi", [4, 32])],
        [info("h2", [4, 32]), info("o", [4, 32])],
    )
    nodes = [node("Scan", "h0 x", "hl hs", "scan", body=body, num_scan_inputs=1), node("MatMul", "hs w2", "y", "out")]
    zero = np.zeros((4, 32), np.float32)
    return model(nodes, [info("x", [10, 4, 32])], [info("y", [10, 4, SIZE])], w=normal(SIZE, 32), w2=normal(32, SIZE), h0=zero)


def branches() -> ModelProto:
    """An If whose branches read a tensor and a weight from outside."""

    def branch(name: str) -> GraphProto:
        nodes = [node("MatMul", f"e w_{name}", f"{name}1", name), node("MatMul", f"{name}1 w", f"{name}2", f"{name} shared")]
        return h.make_graph(nodes, name, [], [info(f"{name}2", None)], [nh.from_array(normal(SIZE, SIZE), f"w_{name}")])

    nodes = [
        node("MatMul", "x w", "e", "in"),
        node("ReduceSum", "x", "sum", keepdims=0),
        node("Greater", "sum zero", "positive"),
        node("If", "positive", "z", "if", then_branch=branch("a"), else_branch=branch("b")),
        node("MatMul", "z w", "y", "out"),
    ]
    shape = ["N", SIZE]
    return model(nodes, [info("x", shape)], [info("y", shape)], w=normal(SIZE, SIZE), zero=np.float32(0))


def cache() -> ModelProto:
    """Attention over a cache of any length, which also gives the position of the new token."""
    nodes = [
        node("Shape", "past", "shape"),
        node("Gather", "shape one", "length"),
        node("Unsqueeze", "length zero", "position"),
        node("Gather", "table position", "pe"),
        node("Add", "x pe", "xp"),
        node("MatMul", "xp wq", "q", "q"),
        node("MatMul", "xp wk", "k", "k"),
        node("Concat", "past k", "present", axis=1),
        node("Transpose", "present", "kt", perm=[0, 2, 1]),
        node("MatMul", "q kt", "s", "scores"),
        node("Softmax", "s", "p"),
        node("MatMul", "p present", "o", "values"),
        node("MatMul", "o wo", "y", "out"),
    ]
    weights = {name: normal(SIZE, SIZE) for name in ("wq", "wk", "wo")}
    return model(
        nodes,
        [info("x", ["N", 1, SIZE]), info("past", ["N", "past", SIZE])],
        [info("y", ["N", 1, SIZE]), info("present", ["N", "total", SIZE])],
        **weights, table=normal(128, SIZE), one=np.int64(1), zero=np.array([0]),
    )  # fmt: skip


def shape_output() -> ModelProto:
    """A size as an output, and no kernel for it."""
    nodes = [node("MatMul", "x w", "y", "fc"), node("Shape", "x", "shape")]
    outs = [info("y", ["N", "L", SIZE]), info("shape", [3], TensorProto.INT64)]
    return model(nodes, [info("x", ["N", "L", SIZE])], outs, w=normal(SIZE, SIZE))


def longest() -> ModelProto:
    """The half of the rows with the largest values: TopK of a size that is known at run time."""
    nodes = [
        node("MatMul", "x w", "a", "in"),
        node("Shape", "x", "n", start=1, end=2),
        node("Div", "n two", "k"),
        node("TopK", "a k", "v i", axis=1),
        node("MatMul", "v w", "y", "out"),
    ]
    return model(nodes, [info("x", ["N", "L", SIZE])], [info("y", ["N", "K", SIZE])], w=normal(SIZE, SIZE), two=np.array([2]))


def named(*names: str) -> ModelProto:
    """A chain of MatMuls of these names, and a tensor with a line break in its name."""
    tensors = ["x", *(f"t\n{i}" for i in range(len(names) - 1)), "y"]
    nodes = [h.make_node("MatMul", [tensors[i], "w"], [tensors[i + 1]], n) for i, n in enumerate(names)]
    return model(nodes, [info("x", ["N", SIZE])], [info("y", ["N", SIZE])], w=normal(SIZE, SIZE))


UNUSUAL: dict[str, Callable[[], ModelProto]] = {
    "lstm": recurrent,
    "lstm of any length": lambda: recurrent(length="T"),
    "gru": lambda: recurrent("GRU", 3),
    "rnn": lambda: recurrent("RNN", 1),
    "loop": loop,
    "scan": scan,
    "if": branches,
    "cache": cache,
    "shape output": shape_output,
    "topk": longest,
}
