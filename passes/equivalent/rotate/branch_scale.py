"""LayerScale: a constant per-channel Mul behind a linear goes into its weight and bias."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ir.edit import replace_value
from qcompile.ir.ops import const_array
from qcompile.ir.select import Selection
from qcompile.report import Remarks
from qcompile.rewrite.linear import scale_outputs
from qcompile.structure import linears_by_output
from qcompile.structure.core import is_channel_vector, only_user, other_input


def fold_branch_scales(graph: ir.Graph, selection: Selection, remarks: Remarks) -> set[str]:
    """(x W + b) * s = x (W diag(s)) + b s for every such Mul; returns the names of the tensors that changed."""
    changed: set[str] = set()
    for output, linear in linears_by_output(graph).items():
        mul = only_user(output, "Mul")
        scale = other_input(mul, output) if mul is not None else None
        if mul is None or linear.channel_axis != -1 or not is_channel_vector(scale, linear.out_channels):
            continue
        if selection.excluded(linear.node):
            continue
        array = const_array(scale)
        assert array is not None
        scale_outputs(linear, array.astype(np.float64).reshape(-1))
        replace_value(graph, mul.outputs[0], output)
        graph.remove(mul, safe=True)
        changed |= {str(output.name), str(linear.node.outputs[0].name), str(mul.outputs[0].name)}
        remarks.applied(str(linear.node.name), "the constant scale of its branch was folded into it")
    return changed
