"""One operator, in ONNX Runtime's kernel and in the plain operators that canonicalize writes for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from qcompile.execute.session import session_options
from qcompile.ir.model import Model
from qcompile.passes.forms.canonicalize.canonicalize import Canonicalize
from tests.passes.running import context

OWN = "com.microsoft"
RNG = np.random.default_rng(0)


def random(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def single(
    op: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    feeds: Mapping[str, NDArray[Any]],
    constants: Mapping[str, ArrayLike] | None = None,
    *,
    domain: str = OWN,
    opset: int = 17,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    **attributes: Any,
) -> Model:
    """A model of one node `n`; the first axis of an input is dynamic where it has two samples; outputs `int_...` are int32,
    `codes_...` int8."""

    def info(name: str, array: NDArray[Any]) -> Any:
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        known = list(array.shape) if array.shape[:1] != (2,) else ["B", *array.shape[1:]]
        return helper.make_tensor_value_info(name, kind, (shapes or {}).get(name, known))

    node = helper.make_node(op, inputs, outputs, name="n", domain=domain, **attributes)
    stored = [numpy_helper.from_array(np.asarray(a), n) for n, a in (constants or {}).items()]
    types = {"int": T.INT32, "codes": T.INT8}
    made = [helper.make_tensor_value_info(o, types.get(o.partition("_")[0], T.FLOAT), None) for o in outputs if o]
    graph = helper.make_graph([node], "g", [info(n, a) for n, a in feeds.items()], made, stored)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(OWN, 1)]
    return Model.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def answers(model: Model, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    session = ort.InferenceSession(model.to_proto().SerializeToString(), session_options(optimize="off"))
    return [np.asarray(y) for y in session.run(None, dict(feeds))]


def taken_apart(model: Model, target: str = "trt") -> tuple[Model, list[str]]:
    """The canonical copy, and why operators stay."""
    after, ctx = model.clone(), context(target)
    Canonicalize().apply(after, ctx)
    return after, [r.reason for r in ctx.remarks.all if r.kind == "missed"]


def assert_same(model: Model, feeds: Mapping[str, NDArray[Any]], tolerance: float = 1e-6) -> Model:
    """Its parts, which compute the same to `tolerance` of the outputs' size, under the same names."""
    after, kept = taken_apart(model)
    assert not kept
    assert [o.name for o in after.graph.outputs] == [o.name for o in model.graph.outputs]
    for a, b in zip(answers(model, feeds), answers(after, feeds), strict=True):
        assert a.shape == b.shape
        lowest = (a < -1e30) | np.isneginf(a)  # a masked score is -inf here, the lowest number there
        assert np.array_equal(lowest, (b < -1e30) | np.isneginf(b))
        size = max(1.0, float(np.abs(a[~lowest]).max(initial=0)))
        assert float(np.abs(a[~lowest] - b[~lowest]).max(initial=0)) <= tolerance * size
    return after
