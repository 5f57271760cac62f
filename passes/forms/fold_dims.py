"""fold-dims: numbers computed from known dimensions become constants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from onnxscript.optimizer import fold_constants

from qcompile.ir.edit import add_constant, erase_dead, replace_value
from qcompile.ir.model import Model
from qcompile.ir.ops import is_const, is_op
from qcompile.ir.shapes import int_vector, rank
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult, Stage

_SIZE_LIMIT = 1 << 31


@dataclass(frozen=True)
class FoldDims(Pass):
    """Fold numbers that exporters compute from known dimensions, such as the attention scale 1 / sqrt(head size).

    before: Mul(q, Sqrt(Div(1, Sqrt(Cast(Slice(Shape(q)))))))     after: Mul(q, 0.42)
    The integer form needs it: a scale that is known costs nothing there.
    """

    name = "fold-dims"
    kind = Kind.EQUIVALENT
    needs = Stage.CANONICAL

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Fold every cast of known dimensions to floating point, and what follows from it."""
        casts = [n for n in model.graph if _is_known(n)]
        for node in casts:
            _fold(model.graph, node)
            ctx.remarks.applied(str(node.name), "computed from known dimensions")
        if casts:
            fold_constants(model.ir, input_size_limit=_SIZE_LIMIT, output_size_limit=_SIZE_LIMIT)
            LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model.ir)
            erase_dead(model)
            model.name_nodes()
        return PassResult(bool(casts))


def _is_known(node: ir.Node) -> bool:
    out = node.outputs[0].dtype
    computed = is_op(node, "Cast") and not is_const(node.inputs[0])
    return computed and out is not None and out.is_floating_point() and int_vector(node.inputs[0]) is not None


def _fold(graph: ir.Graph, node: ir.Node) -> None:
    vector, out = int_vector(node.inputs[0]), node.outputs[0]
    assert vector is not None and out.dtype is not None
    array = np.asarray(vector, out.dtype.numpy())
    shaped = array.reshape(()) if rank(node.inputs[0]) == 0 else array
    replace_value(graph, out, add_constant(graph, f"{out.name}_folded", shaped, out.dtype))
