"""Small integer graphs, and the four other ways to run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qcompile.execute.session import Optimize, make_session

Array = NDArray[Any]
SETTINGS: tuple[tuple[Optimize, int], ...] = tuple((o, t) for o in ("off", "basic", "all") for t in (1, 2))
OPSET, IR = 21, 10


def model_of(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Array],
    outputs: Sequence[str],
    constants: Mapping[str, Array] | None = None,
    *,
    dynamic: bool = False,
) -> onnx.ModelProto:
    """A checked model whose inputs have the types and shapes of `inputs`; output types are inferred."""
    given = [_info(name, x, dynamic) for name, x in inputs.items()]
    stored = [numpy_helper.from_array(np.asarray(a), name) for name, a in (constants or {}).items()]
    made = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph(list(nodes), "integers", given, made, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    onnx.checker.check_model(inferred)
    return inferred


def _info(name: str, x: Array, dynamic: bool) -> onnx.ValueInfoProto:
    shape: list[int | str] = list(x.shape)
    if dynamic:
        shape[0] = "N"
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), shape)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str] | str, **attributes: Any) -> NodeProto:
    """A node named after its first output."""
    names = [outputs] if isinstance(outputs, str) else list(outputs)
    return helper.make_node(op, list(inputs), names, name=f"{names[0]}_node", **attributes)


def on_ort(model: onnx.ModelProto, feeds: Mapping[str, Array], optimize: Optimize = "all", threads: int = 1) -> list[Array]:
    """ONNX Runtime on the CPU."""
    session = make_session(model.SerializeToString(), optimize=optimize, threads=threads, use=["CPUExecutionProvider"])
    return [np.asarray(x) for x in session.run(None, dict(feeds))]


def on_reference(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """onnx.reference."""
    return [np.asarray(x) for x in ReferenceEvaluator(model).run(None, dict(feeds))]


def requantize_nodes(acc: str, out: str, m: str, e: str, *, zero: str | None = None) -> list[NodeProto]:
    """acc (int32) -> out (int8): the dyadic chain in the bias form; constants of `requantize_constants` are expected."""
    t = [f"{out}_{i}" for i in range(9)]
    made = [
        node("Cast", [acc], t[0], to=TensorProto.INT64),
        node("Mul", [t[0], m], t[1]),
        node("Add", [t[1], f"{out}_half"], t[2]),
        node("Add", [t[2], f"{out}_bias"], t[3]),
        node("Cast", [t[3]], t[4], to=TensorProto.UINT64),
        node("BitShift", [t[4], e], t[5], direction="RIGHT"),
        node("Cast", [t[5]], t[6], to=TensorProto.INT64),
        node("Sub", [t[6], f"{out}_unbias"], t[7]),
    ]
    last = t[7]
    if zero is not None:
        made.append(node("Add", [last, zero], t[8]))
        last = t[8]
    made.append(node("Clip", [last, f"{out}_lo", f"{out}_hi"], f"{out}_clipped"))
    return [*made, node("Cast", [f"{out}_clipped"], out, to=TensorProto.INT8)]


def requantize_constants(out: str, e: Array, low: int = -128, high: int = 127) -> dict[str, Array]:
    """2^(e-1), 2^62, 2^(62-e) and the limits."""
    e = np.asarray(e, np.int64)
    return {
        f"{out}_half": np.left_shift(np.int64(1), e - 1),
        f"{out}_bias": np.asarray(1 << 62, np.int64),
        f"{out}_unbias": np.right_shift(np.int64(1 << 62), e),
        f"{out}_lo": np.asarray(low, np.int64),
        f"{out}_hi": np.asarray(high, np.int64),
    }
