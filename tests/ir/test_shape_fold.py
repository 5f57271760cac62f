"""Shape vectors computed from known dimensions become constants."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from qcompile.ir import ops
from qcompile.ir.shape_fold import fold_shapes

SHAPE = "s = Shape(x) zero = Constant<value_ints = [0]>() one = Constant<value_ints = [1]>() "
CASES = {
    "known": ("2,3,4", SHAPE + "y = Reshape(x, s)", (2, 3, 4)),
    "one dynamic axis": ("N,3,4", SHAPE + "y = Reshape(x, s)", (-1, 3, 4)),
    "split heads": (
        "N,T,4",
        SHAPE + "n = Gather(s, zero) t = Gather(s, one) h = Constant<value_ints = [2, 2]>() "
        "v = Concat<axis = 0>(n, t, h) y = Reshape(x, v)",
        (0, 0, 2, 2),
    ),
    "swin padding": (
        "N,5,4",
        SHAPE + "w = Constant<value_ints = [4]>() t = Gather(s, one) m = Mod(t, w) d = Sub(w, m) e = Mod(d, w) "
        "v = Concat<axis = 0>(zero, zero, zero, zero, e, zero) y = Pad(x, v)",
        (0, 0, 0, 0, 3, 0),
    ),
    "repeat heads": (
        "N,3,4",
        SHAPE + "two = Constant<value_ints = [2]>() n = Gather(s, zero) r = Constant<value_ints = [3, 4]>() "
        "v = Concat<axis = 0>(n, two, r) u = Unsqueeze(x, one) y = Expand(u, v)",
        (1, 2, 3, 4),
    ),
}


def graph_of(shape: str, body: str) -> ir.Graph:
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[{shape}] x) => (float[A] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].ClearField("type")
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto)).graph


@pytest.mark.parametrize("name", CASES)
def test_folds(name: str) -> None:
    shape, body, expected = CASES[name]
    graph = graph_of(shape, body)
    assert fold_shapes(graph) == 1
    assert ops.const_ints(graph[-1].inputs[1]) == expected
    assert fold_shapes(graph) == 0


def test_two_unrelated_unknown_sizes_stay_computed() -> None:
    graph = graph_of("N,T,4", "k = Shape(x) p = Transpose<perm = [1, 0, 2]>(x) y = Reshape(p, k)")
    assert fold_shapes(graph) == 0
