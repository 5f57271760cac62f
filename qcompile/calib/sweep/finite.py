"""NaN and infinite values in probed tensors: found, and named."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.sweep.graphs import named_values
from qcompile.errors import DataError
from qcompile.ir.model import Model
from qcompile.ir.optable import ops_with

_SPREADS_NAN = ops_with("spreads-nan")


def blind_tensors(probed: set[str], values: dict[str, ir.Value]) -> set[str]:
    """Probed tensors whose NaN no other probed tensor would show: none of them is computed from it, or only through
    operators that may drop NaN (Relu, MaxPool, Where, Gather, ...)."""
    covered: set[str] = set()

    def shows(value: ir.Value) -> bool:
        return any(n.op_type in _SPREADS_NAN and n.domain == "" and _reached(n) for n, _ in value.uses())

    def _reached(node: ir.Node) -> bool:
        return any(str(out.name) in probed or str(out.name) in covered for out in node.outputs)

    for value in reversed(list(values.values())):  # consumers stand behind their producers
        if shows(value):
            covered.add(str(value.name))
    return probed - covered


def require_finite(model: Model, tensor: str, array: NDArray[Any], first: int) -> None:
    """`array` is `tensor` on the batch that starts at sample `first`.

    Raises:
        DataError: NaN or infinite values; names the node that made the tensor, and the sample.
    """
    if array.dtype.kind not in "fV":
        return
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(array.sum()):  # cheaper than a mask; finite values may still overflow it
            return
    if np.isfinite(array).all():
        return
    bad = np.argwhere(~np.isfinite(array))[0]
    what = "NaN" if np.isnan(array[tuple(bad)]) else "infinite values"
    sample = first + (int(bad[0]) if array.ndim > 1 else 0)
    node = named_values(model)[tensor].producer()
    maker = f"made by node {node.name!r} ({node.op_type})" if node is not None else "an input of the model"
    raise DataError(
        f"tensor {tensor!r}, {maker}, has {what} from sample {sample} on; "
        "check that sample's inputs and preprocessing, or keep that node in float with --keep-float"
    )
