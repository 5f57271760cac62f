"""The index algebra against numpy: where every element of a moved tensor came from."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from qcompile.structure.channels.layout import Factor, Layout, channels, cut, reshape, token
from qcompile.structure.channels.trace import start_layout, trace

BATCH, TOKENS, CHANNELS = 2, 3, 24
START = Layout((token(BATCH), token(TOKENS), channels(CHANNELS)))
NUMBERS = np.broadcast_to(np.arange(CHANNELS), (BATCH, TOKENS, CHANNELS))
Pair = tuple[Layout, np.ndarray]


def predicted(layout: Layout) -> np.ndarray:
    """Channel number of every element, from the layout."""
    total = np.full((1,) * len(layout.axes), layout.offset)
    for i in range(len(layout.axes)):
        own = layout.columns(i)
        assert own is not None
        total = total + (own - layout.offset).reshape([-1 if j == i else 1 for j in range(len(layout.axes))])
    return total


def permute(pair: Pair, data: st.DataObject) -> Pair:
    layout, array = pair
    perm = data.draw(st.permutations(range(array.ndim)))
    return Layout(tuple(layout.axes[p] for p in perm), layout.offset), array.transpose(perm)


def regroup(pair: Pair, data: st.DataObject) -> Pair:
    layout, array = pair
    target: list[int] = []
    left = array.size
    while left > 1:
        target.append(data.draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0])))
        left //= target[-1]
    target = target or [1]
    moved = reshape(layout, target)
    return (layout, array) if moved is None else (moved, array.reshape(target))


def take(pair: Pair, data: st.DataObject) -> Pair:
    layout, array = pair
    axis = data.draw(st.integers(0, array.ndim - 1))
    start = data.draw(st.integers(0, array.shape[axis] - 1))
    stop = data.draw(st.integers(start + 1, array.shape[axis]))
    moved = cut(layout, axis, start, stop)
    return (layout, array) if moved is None else (moved, array.take(range(start, stop), axis))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_moves_agree_with_numpy(data: st.DataObject) -> None:
    pair: Pair = (START, NUMBERS)
    for move in data.draw(st.lists(st.sampled_from([permute, regroup, take]), max_size=6)):
        pair = move(pair, data)
        layout, array = pair
        np.testing.assert_array_equal(np.broadcast_to(predicted(layout), array.shape), array)


def test_reshape_keeps_what_it_can_prove() -> None:
    named = Layout((token("N"), token("T"), channels(24)))
    heads = reshape(named, ["N", "T", 3, 2, 4])
    assert heads is not None and heads.axes[2:] == ((Factor(3, 8),), (Factor(2, 4),), (Factor(4, 1),))
    assert reshape(named, [None, None, 3, 2, 4]) is not None
    assert reshape(named, [None, 24]) == Layout(((Factor("N"), Factor("T")), (Factor(24, 1),)))
    assert reshape(named, [None, None]) is None


def test_reshape_pairs_unknown_sizes_in_order() -> None:
    split = Layout((token(None), (Factor(2, 4),), token(None), (Factor(4, 1),)))
    assert reshape(split, [None, 2, None, 4]) == split
    assert reshape(split, [None, None, 4]) is None


def test_an_open_layout_closes_when_the_rank_is_known() -> None:
    opened = Layout((channels(8),), open=True)
    assert opened.closed(3) == Layout((token(None), token(None), channels(8)))
    assert opened.index(-1) == 0 and opened.index(-2) is None and opened.index(0) is None
    split = reshape(opened, [None, None, 2, 4])
    assert split is not None and split.axes[2:] == ((Factor(2, 4),), (Factor(4, 1),))


def test_cut_inside_a_factor() -> None:
    heads = Layout(((Factor(2, 12), Factor(3, 4)),))
    assert cut(heads, 0, 3, 6) == Layout(((Factor(3, 4),),), offset=12)
    assert cut(heads, 0, 4, 6) == Layout(((Factor(2, 4),),), offset=16)
    assert cut(heads, 0, 2, 4) is None


MOVES = [
    "y = Transpose<perm = [0, 2, 1]>(x)",
    "s = Constant<value_ints = [2, 3, 2, 3, 4]>() r = Reshape(x, s) y = Transpose<perm = [2, 0, 3, 1, 4]>(r)",
    "a, b, c = Split<axis = 2, num_outputs = 3>(x) y = Identity(b)",
    "i = Constant<value_int = 1>() s = Constant<value_ints = [2, 3, 3, 8]>() r = Reshape(x, s) y = Gather<axis = 2>(r, i)",
    "b = Constant<value_ints = [8]>() e = Constant<value_ints = [16]>() a = Constant<value_ints = [-1]>() y = Slice(x, b, e, a)",
    "b = Constant<value_ints = [1]>() e = Constant<value_ints = [9999]>() a = Constant<value_ints = [1]>() y = Slice(x, b, e, a)",
    "a = Constant<value_ints = [1]>() u = Unsqueeze(x, a) s = Constant<value_ints = [2, 5, 3, 24]>() y = Expand(u, s)",
    "a = Constant<value_ints = [1]>() u = Unsqueeze(x, a) y = Squeeze(u, a)",
    "r = Constant<value_ints = [1, 2, 3]>() y = Tile(x, r)",
    "y = Concat<axis = 1>(x, x)",
    "y = Flatten<axis = 2>(x)",
    "i = Constant<value_ints = [2, 0]>() y = Gather<axis = 1>(x, i)",
    "p = Constant<value_ints = [0, 0, 0, 0, 0, 0]>() y = Pad(x, p)",
]


@pytest.mark.parametrize("body", MOVES)
def test_the_tracer_agrees_with_onnx(body: str) -> None:
    signature = f"g (float[{BATCH},{TOKENS},{CHANNELS}] x) => (float[A] z)"
    text = f'<ir_version: 10, opset_import: ["" : 20]> {signature} {{ {body} z = Relu(y) }}'
    proto = onnx.parser.parse_model(text)
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    model.graph.output[0].CopyFrom(onnx.helper.make_empty_tensor_value_info("y"))
    del model.graph.node[-1]
    expected = ReferenceEvaluator(model).run(None, {"x": NUMBERS.astype(np.float32)})[0]
    graph = ir.from_proto(proto).graph
    start = start_layout(graph.inputs[0], CHANNELS)
    assert start is not None
    traced = trace(graph.inputs[0], start)
    ends = [a.layout for a in traced.arrivals if a.node.op_type == "Relu"]
    assert len(ends) == 1 and not traced.lost
    layout = with_sizes(ends[0], np.shape(expected))
    np.testing.assert_array_equal(np.broadcast_to(predicted(layout), np.shape(expected)), expected)


def with_sizes(layout: Layout, shape: tuple[int, ...]) -> Layout:
    """Token axes whose size was not known get it from `shape`."""
    axes = (token(shape[i]) if any(f.size is None for f in axis) else axis for i, axis in enumerate(layout.axes))
    return Layout(tuple(axes), layout.offset)
