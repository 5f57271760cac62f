"""What a model answers, how far two answers stand apart, and the same model in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from qcompile.execute.emulate.runnable import runnable
from qcompile.execute.session import make_session
from qcompile.ir.model import Model
from qcompile.ir.tensors import map_tensors
from tests.passes.models import Feeds

_FLOAT, _DOUBLE = ir.DataType.FLOAT, ir.DataType.DOUBLE


def outputs(model: Model, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """All outputs in ONNX Runtime: optimizations off, Q/DQ as they stand."""
    session = make_session(
        runnable(model).to_proto().SerializeToString(), optimize="off", qdq_fusion=False, threads=1, use=["CPUExecutionProvider"]
    )
    batch = _fixed(model)
    if batch is None:
        return [np.asarray(a) for a in session.run(None, dict(feeds))]
    count = len(next(iter(feeds.values())))
    runs = [session.run(None, {n: a[i : i + batch] for n, a in feeds.items()}) for i in range(0, count, batch)]
    return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


def _fixed(model: Model) -> int | None:
    first = model.inputs()[0].shape[0]
    return first if isinstance(first, int) else None


def run_fused(model: Model, arrays: Feeds, qdq_fusion: bool = True) -> NDArray[Any]:
    """The first output in ONNX Runtime with all optimizations."""
    session = make_session(model.to_proto().SerializeToString(), optimize="all", qdq_fusion=qdq_fusion, threads=1)
    return np.asarray(session.run(None, arrays)[0])


def relative_error(a: Sequence[NDArray[Any]], b: Sequence[NDArray[Any]]) -> float:
    """The largest max|d| / max|y| of all outputs."""
    pairs = [(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(a, b, strict=True)]
    return max(float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-300)) for x, y in pairs)


def sqnr_db(reference: NDArray[Any], candidate: NDArray[Any]) -> float:
    """Signal to noise in dB."""
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    return float(10 * np.log10(np.square(a).sum() / max(float(np.square(a - b).sum()), 1e-300)))


def to_double(model: Model) -> Model:
    """The same model with every float32 tensor, weight and cast in float64."""
    wide = model.clone()
    map_tensors(wide.ir, _widened)
    for graph in [wide.graph, *wide.graph.subgraphs()]:
        for value in [*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)]:
            if value.dtype == _FLOAT:
                value.type = ir.TensorType(_DOUBLE)
        for node in graph:
            _widen_attributes(node)
    return wide


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().astype(np.float64), name=tensor.name) if tensor.dtype == _FLOAT else tensor


def _widen_attributes(node: ir.Node) -> None:
    if node.op_type == "Cast" and node.attributes["to"].as_int() == _FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(_DOUBLE))
    if node.op_type == "Constant" and "value_float" in node.attributes:
        number = node.attributes.pop("value_float").as_float()
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(np.float64(number)))


def double_outputs(model: Model, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """All outputs of a float64 model in the reference evaluator (ONNX Runtime has few float64 kernels)."""
    wide = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in feeds.items()}
    batch = _fixed(model)
    if batch is not None:
        wide = {n: a[:batch] for n, a in wide.items()}
    return [np.asarray(a) for a in ReferenceEvaluator(model.to_proto()).run(None, wide)]


def op_types(model: Model) -> list[str]:
    """Operator types in order."""
    return [node.op_type for node in model.graph]


def constants_of(model: Model) -> dict[str, NDArray[Any]]:
    """Initializers by name."""
    return {n: v.const_value.numpy() for n, v in model.graph.initializers.items() if v.const_value is not None}
