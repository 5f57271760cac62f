"""Which nodes stay in float32 when the rest becomes 16 bits wide, and why: each rule yields (node, reason)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import onnx_ir as ir

from qcompile.ir.ops import const_array, const_scalar, input_at, is_const, is_data_movement, is_op, static_shape
from qcompile.ir.optable import ops_with
from qcompile.rewrite.half.measures import CANCEL, Measures, is_elementwise
from qcompile.rewrite.half.slots import refusal
from qcompile.rewrite.half.types import carries_float, float_constants, is_float

Finding = tuple[ir.Node, str]
Rule = Callable[[Measures], Iterable[Finding]]

TINY = 2.0**-20  # float16 keeps at most 4 bits of smaller numbers
_FLOAT_OPS = ops_with("random") | {"Range", "RoiAlign"}
_RECURRENT, _LENGTHS = ("RNN", "LSTM", "GRU"), 4
_SQUARES = ("ReduceL2", "ReduceSumSquare", "ReduceLogSumExp", "LpNormalization", "MeanVarianceNormalization")
_BIGGEST_ISLAND_JOIN = 4


def islands(scene: Measures) -> dict[ir.Node, str]:
    """Nodes to keep in float32, each with the first reason found; small gaps between them are closed."""
    found: dict[ir.Node, str] = {}
    for rule in RULES:
        for node, reason in rule(scene):
            if carries_float(node):
                found.setdefault(node, reason)
    for node in _gaps(scene.graph, found):
        found[node] = "it stands between nodes in float32, and a Cast on each side would cost more"
    return found


# ---- values -------------------------------------------------------------------------------------------------------


def _unsupported(scene: Measures) -> Iterator[Finding]:
    for node in scene.graph:
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            yield node, "its body stays as it is"
        elif (reason := refusal(node, scene.fmt, scene.graph.opset_imports)) is not None:
            yield node, reason
        elif node.op_type in _FLOAT_OPS:
            yield node, f"{node.op_type} is not computed in {scene.fmt.title}"


def _recurrent(scene: Measures) -> Iterator[Finding]:
    """TensorRT (RTX 1.7.1) builds no lengths in 16 bits, and no Cast in front of the recurrence: it moves it past what copies."""
    for node in scene.graph:
        if is_op(node, *_RECURRENT) and input_at(node, _LENGTHS) is not None:
            yield node, f"a {node.op_type} with sequence lengths does not build in {scene.fmt.title}"
            yield from ((n, f"{node.name} reads it, and builders fail on a Cast in between") for n in _makers(node.inputs[0]))


def _makers(value: ir.Value | None) -> Iterator[ir.Node]:
    """What makes `value`, and what copies it on."""
    node = value.producer() if value is not None else None
    while node is not None:
        yield node
        source = node.inputs[0] if is_data_movement(node) else None
        node = source.producer() if source is not None else None


def _positions(scene: Measures) -> Iterator[Finding]:
    """What a Range counts, up to where it meets data: builders merge a Cast right behind a Range into it, and fail."""
    free: set[ir.Node] = set()
    for node in scene.graph:
        sources = [v.producer() for v in node.inputs if v is not None and is_float(v) and not is_const(v)]
        mask = any(v.name in scene.masks.reached for v in node.outputs)
        if carries_float(node) and not mask and all(s in free for s in sources):
            free.add(node)
    for start in [n for n in scene.graph if n in free and is_op(n, "Range")]:
        yield from ((node, "it computes positions, from numbers that a Range counts") for node in _group(start, free))


def _overflow(scene: Measures) -> Iterator[Finding]:
    large = scene.large()
    for node in scene.graph:
        hot = next((v for v in (*node.outputs, *node.inputs) if v in large), None)
        if hot is not None:
            limit = "exact integers end" if large[hot] <= scene.fmt.safe else "the margin ends"
            end = scene.fmt.integers if large[hot] <= scene.fmt.safe else scene.fmt.safe
            yield node, f"{hot.name} reaches {large[hot]:.5g} on calibration data, and {limit} at {end:.5g}"


def _reductions(scene: Measures) -> Iterator[Finding]:
    for node, value, terms in scene.deep():
        if scene.peak(value) * terms > scene.fmt.largest:
            yield node, f"it adds up {terms} terms of up to {scene.peak(value):.4g}, which may exceed {scene.fmt.largest:.0f}"
    for node in scene.graph:
        length = (static_shape(input_at(node, 0)) or (None,))[-1] if is_op(node, "Softmax", "LogSoftmax") else None
        if length is not None and scene.fmt.ranged and length > scene.fmt.safe:
            yield node, f"it adds up {length} exponentials"


def _squares(scene: Measures) -> Iterator[Finding]:
    for node in scene.graph:
        if is_op(node, *_SQUARES):
            yield node, f"the squares or exponentials inside {node.op_type} exceed the range of their input"


def _divisors(scene: Measures) -> Iterator[Finding]:
    for node, value in scene.divisors():
        low = scene.smallest(value)
        if low < scene.fmt.normal:
            reason = f"{value.name} falls to {low:.2g}, below the normal numbers of {scene.fmt.title}, and is divided by"
            yield node, reason
            producer = value.producer()
            if producer is not None:
                yield producer, reason


def _angles(scene: Measures) -> Iterator[Finding]:
    for value in scene.angles():
        peak = scene.peak(value)
        if peak > scene.fmt.angle:
            reason = f"the angle {value.name} reaches {peak:.4g}, where {scene.fmt.title} is too coarse for a sine"
            yield from ((user, reason) for user, _ in value.uses() if is_op(user, "Sin", "Cos"))
            yield from ((node, reason) for node in _cone(value))


def _cone(value: ir.Value | None) -> Iterator[ir.Node]:
    """What computes an angle: arithmetic on positions, back to the first layer."""
    producer = value.producer() if value is not None else None
    outer = is_op(producer, "MatMul") and producer is not None and (static_shape(producer.inputs[0]) or (None,))[-1] == 1
    if producer is None or not carries_float(producer) or not (is_elementwise(producer) or outer):
        return
    yield producer
    for source in producer.inputs:
        yield from _cone(source)


# ---- constants ----------------------------------------------------------------------------------------------------


def _constants(scene: Measures) -> Iterator[Finding]:
    for node in scene.graph:
        for slot, array in float_constants(node):
            if node.inputs[slot] in scene.masks.constants or _is_limit(node, slot):
                continue
            size = np.abs(array[np.isfinite(array)]).max(initial=0.0)
            if size > scene.fmt.largest:
                yield node, f"its constant {size:.3g} overflows {scene.fmt.title}"
            elif 0.0 < size < TINY and scene.fmt.ranged and _matters(node, slot, array.size):
                yield node, f"its constant {size:.3g} vanishes in {scene.fmt.title}"


def _is_limit(node: ir.Node, slot: int) -> bool:
    """A bound that is as good when it saturates."""
    return is_op(node, "Min", "Max") or (is_op(node, "Clip") and slot > 0)


def _matters(node: ir.Node, slot: int, size: int) -> bool:
    """Whether a vanishing constant changes the result: a factor does, a summand or bias of many does not."""
    if is_op(node, "QuantizeLinear", "DequantizeLinear") or (is_op(node, "Conv", "Gemm") and slot > 1):
        return False
    return size == 1 or is_op(node, "Mul", "Div", "MatMul", "Gemm", "Conv", "ConvTranspose")


def _cuts(scene: Measures) -> Iterator[Finding]:
    """Conv -> Clip (Relu6): what the Clip lets through may be small beside the terms that are rounded and cancel."""
    for node, weight, end in scene.cuts():
        term = weight * scene.peak(node.inputs[0])
        if CANCEL * end < term < float("inf"):
            yield node, f"its terms reach {term:.4g} and its output is cut at {end:g}: rounding them would show"


def _guards(scene: Measures) -> Iterator[Finding]:
    """An epsilon that vanishes guards a division: the whole quotient stays, up to it."""
    for node in scene.graph:
        if scene.fmt.ranged and is_op(node, "Add", "Max", "Clip") and _epsilon(node) is not None:
            reason = f"it keeps the epsilon {_epsilon(node):.1g} of a division, which vanishes in {scene.fmt.title}"
            path = list(_to_division(node.outputs[0]))
            yield from ((n, reason) for n in ([node, *path] if path else []))


def _epsilon(node: ir.Node) -> float | None:
    values = [const_scalar(v) for v in node.inputs]
    return next((v for v in values if v is not None and 0.0 < v < TINY), None)


def _to_division(value: ir.Value) -> Iterator[ir.Node]:
    for user, slot in value.uses():
        if is_op(user, "Reciprocal", "Log") or (is_op(user, "Div") and slot == 1):
            yield user
        elif is_op(user, "Sqrt", "Pow", "Cast", "Identity") or is_data_movement(user):
            path = list(_to_division(user.outputs[0]))
            yield from [user, *path] if path or is_op(user, "Pow") else []


def _scales(scene: Measures) -> Iterator[Finding]:
    for node in scene.graph:
        scale = const_array(input_at(node, 1)) if is_op(node, "QuantizeLinear", "DequantizeLinear") else None
        if scale is None or not scale.size or scale.dtype != np.float32:
            continue
        if scale.max() < TINY and scene.fmt.ranged:
            yield node, f"its scale {scale.max():.2g} vanishes in {scene.fmt.title}"
        elif _reach(node, scale) > scene.fmt.largest:
            yield node, f"its codes reach {_reach(node, scale):.3g}, beyond {scene.fmt.title}"


def _reach(node: ir.Node, scale: np.ndarray) -> float:
    """The largest number that the codes of a DequantizeLinear stand for; 0 for weights, which are known."""
    codes = const_array(node.inputs[0])
    if not is_op(node, "DequantizeLinear"):
        return 0.0
    top = 128.0 if codes is None else float(np.abs(codes.astype(np.float32)).max(initial=0.0))
    return top * float(scale.max())


# ---- norms --------------------------------------------------------------------------------------------------------


def _norm_statistics(scene: Measures) -> Iterator[Finding]:
    """In a decomposed norm the square, its mean and its root: what LayerNormalization computes in float32 too."""
    for node in scene.graph:
        exponent = 0.5 if is_op(node, "Sqrt") else const_scalar(input_at(node, 1)) if is_op(node, "Pow") else None
        body = _variance(node) if exponent is not None and abs(exponent) == 0.5 else []
        if any(is_op(n, "ReduceMean", "ReduceSum") for n in body) and any(_is_square(n) for n in body):
            reason = "the squares of a norm overflow or vanish; its variance is computed as LayerNormalization does"
            yield from ((n, reason) for n in [node, *body, *_inverses(node.outputs[0])])


def _variance(root: ir.Node) -> list[ir.Node]:
    """The nodes between the square (included) and the root, backwards."""
    body: dict[ir.Node, None] = {}
    todo = [v.producer() for v in root.inputs if v is not None]
    while todo:
        node = todo.pop()
        if node is None or node in body or not (_is_square(node) or is_op(node, *_VARIANCE)):
            continue
        body[node] = None
        todo += [] if _is_square(node) else [v.producer() for v in node.inputs if v is not None]
    return list(body)


_VARIANCE = ops_with("arithmetic") - {"Mul", "Pow"} | {"Max", "Clip", "Cast", "Identity", "ReduceMean", "ReduceSum"}


def _is_square(node: ir.Node) -> bool:
    if is_op(node, "Pow"):
        return const_scalar(input_at(node, 1)) == 2.0
    return is_op(node, "Mul") and node.inputs[0] is node.inputs[1]


def _inverses(value: ir.Value) -> Iterator[ir.Node]:
    for user, slot in value.uses():
        if is_op(user, "Reciprocal") or (is_op(user, "Div") and slot == 1 and const_scalar(user.inputs[0]) is not None):
            yield user


# ---- gaps ---------------------------------------------------------------------------------------------------------


def _gaps(graph: ir.Graph, kept: dict[ir.Node, str]) -> Iterator[ir.Node]:
    """Small groups of cheap nodes that read and feed nothing but islands."""
    cheap = {n for n in graph if n not in kept and is_elementwise(n) and carries_float(n)}
    seen: set[ir.Node] = set()
    for node in [n for n in graph if n in cheap]:
        if node in seen:
            continue
        group = _group(node, cheap)
        seen.update(group)
        if len(group) <= _BIGGEST_ISLAND_JOIN and _enclosed(group, kept):
            yield from group


def _group(start: ir.Node, within: set[ir.Node]) -> dict[ir.Node, None]:
    group: dict[ir.Node, None] = {}
    todo = [start]
    while todo:
        node = todo.pop()
        if node in group or node not in within:
            continue
        group[node] = None
        todo += [p for v in node.inputs if v is not None and is_float(v) and (p := v.producer()) is not None]
        todo += [user for v in node.outputs if is_float(v) for user, _ in v.uses()]
    return group


def _enclosed(group: dict[ir.Node, None], kept: dict[ir.Node, str]) -> bool:
    sources = [v.producer() for n in group for v in n.inputs if v is not None and is_float(v) and v.const_value is None]
    readers = [user for n in group for v in n.outputs for user, _ in v.uses()]
    return bool(sources) and all(n in kept or n in group for n in [*sources, *readers] if n is not None) and None not in sources


RULES: tuple[Rule, ...] = (
    _unsupported, _recurrent, _positions, _norm_statistics, _constants, _overflow, _reductions, _squares, _guards, _cuts,
    _divisors, _angles, _scales,
)  # fmt: skip
