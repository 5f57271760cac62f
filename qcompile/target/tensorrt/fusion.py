"""When an attention block becomes one kernel (measured with TensorRT-RTX 1.7.1 on blocks that were built one by one)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from onnx import NodeProto, TensorProto

from qcompile.target.attention import AttentionBlock
from qcompile.target.view import DEQUANTIZE_OPS, MOVEMENT_OPS, QUANTIZE_OPS, GraphView

Shapes = Mapping[str, Sequence[int]]
HEADS = {"int8": (16, 32, 64)}
"""Head sizes that a type of codes has kernels for, where they are few."""
_INT8_KEYS = 512
_FP8_KEYS = 32
_SMALLEST_HEAD, _LARGEST_HEAD = 9, 256
_ARITHMETIC = frozenset({"Mul", "Div", "Add", "Sub", "Where"})


@dataclass(frozen=True)
class BlockFacts:
    """One block, as far as it is known (None: not known).

    `code`: the type of q, k, probabilities and v, None for float.  `head`, `value_head`: their sizes.  `queries`: the smallest
    length, `keys`: the smallest and largest.  `softcap`: Tanh on the scores.  `guard`: rows of NaN are replaced behind the
    softmax.  `output`: whether what P V makes is quantized before anything is computed from it.
    """

    code: str | None
    head: int | None = None
    value_head: int | None = None
    queries: int | None = None
    keys: tuple[int | None, int | None] = (None, None)
    softcap: bool = False
    guard: bool = False
    output: bool = True


def obstacles(b: BlockFacts) -> Iterator[str]:
    """Why the block becomes several kernels, each with what helps; empty: it is one kernel, or the reason is not known."""
    if b.softcap:
        yield "its scores pass a Tanh (softcap), which no fused kernel has"
    if b.head is not None and b.value_head is not None and b.head != b.value_head:
        yield f"its values have heads of {b.value_head}, its queries of {b.head}: fused kernels need one size"
    if b.guard and b.code is not None:
        yield "the probabilities pass IsNaN and Where (a guard against rows without a key): without it the block fuses"
    yield from {"int8": _int8, "float8e4m3fn": _fp8}.get(b.code or "", _float)(b)


def only_in_float(b: BlockFacts) -> str | None:
    """Why the quantized block becomes several kernels where the same block in float16 is one; None if that is not known."""
    reasons = [*obstacles(replace(b, output=True))]
    if not reasons or [*obstacles(replace(b, code=None))]:
        return None
    return reasons[0].partition(";")[0].partition(" (")[0]


def _float(b: BlockFacts) -> Iterator[str]:
    if b.head is not None and not _SMALLEST_HEAD <= b.head <= _LARGEST_HEAD:
        yield f"its head size is {b.head}: float16 kernels have {_SMALLEST_HEAD} to {_LARGEST_HEAD}"


def _int8(b: BlockFacts) -> Iterator[str]:
    other = "; in float16 it would be one kernel (--keep-float its MatMul)" if not [*_float(b)] and not b.softcap else ""
    if b.head is not None and b.head not in HEADS["int8"]:
        yield f"its head size is {b.head}: INT8 kernels have 16, 32 and 64{other}"
    if b.keys[1] is not None and b.keys[1] > _INT8_KEYS:
        yield f"it has up to {b.keys[1]} keys: INT8 kernels end at {_INT8_KEYS}{other}"
    if b.queries == 1:
        yield f"it has one query: INT8 kernels begin at 2{other}"
    if not b.output:
        yield "its output is not quantized: an INT8 kernel needs Q/DQ there too (--quantize the layer behind it)"


def _fp8(b: BlockFacts) -> Iterator[str]:
    if b.head is not None and b.head > _LARGEST_HEAD:
        yield f"its head size is {b.head}: FP8 kernels end at {_LARGEST_HEAD}"
    if b.keys[0] is not None and b.keys[0] < _FP8_KEYS:
        yield f"it has as few as {b.keys[0]} keys: FP8 kernels begin at {_FP8_KEYS} (raise the profile's minimum)"


def unfused(view: GraphView, block: AttentionBlock, smallest: Shapes, largest: Shapes) -> tuple[str, ...]:
    """Why `block` became several kernels, at the smallest and largest shapes of a profile."""
    names = {part: node.input[slot] for part, (node, slot) in block.operands.items()}
    sources = {part: dequantized(view, name) for part, name in names.items()}
    done = [part for part, source in sources.items() if source is not None]
    if 0 < len(done) < len(sources):
        return (f"of q, k, softmax and v only {', '.join(done)} are quantized",)
    if any(n.op_type in DEQUANTIZE_OPS for n in block.scores.between):
        return ("its scores are quantized",)
    v = sources["v"]
    code = None if v is None else view.low_type(v)
    if code is None and view.elem_types.get(names["q"]) == TensorProto.FLOAT:
        return ("it is computed in float32: only 16-bit and quantized attention has a fused kernel",)
    return tuple(obstacles(_facts(view, block, code, names, smallest, largest)))


def _facts(
    view: GraphView, block: AttentionBlock, code: str | None, names: Mapping[str, str], smallest: Shapes, largest: Shapes
) -> BlockFacts:
    def size(shapes: Shapes, part: str, axis: int) -> int | None:
        shape = shapes.get(names[part], ())
        return shape[axis] if len(shape) >= 2 else None

    return BlockFacts(
        code,
        head=size(largest, "q", -1),
        value_head=size(largest, "v", -1 if block.values.slot else -2),
        queries=size(smallest, "q", -2),
        keys=(size(smallest, "k", -1), size(largest, "k", -1)),
        softcap=any(n.op_type == "Tanh" for n in block.scores.between),
        guard=any(n.op_type == "Where" and _made_by(view, n.input[0], "IsNaN") for n in block.values.changed),
        output=_quantized_behind(view, block.values.matmul.output[0]),
    )


def _made_by(view: GraphView, name: str, op: str) -> bool:
    node = view.producer.get(name)
    return node is not None and node.op_type == op


def _quantized_behind(view: GraphView, name: str) -> bool:
    """Whether a QuantizeLinear reads the tensor, itself, moved, or with 0 in the rows that see no key."""
    uses = [node for node, slot in view.consumers.get(name, ()) if slot == (node.op_type == "Where")]
    passed = MOVEMENT_OPS | {"Where"}
    return any(n.op_type in QUANTIZE_OPS or (n.op_type in passed and _quantized_behind(view, n.output[0])) for n in uses)


def dequantized(view: GraphView, name: str) -> NodeProto | None:
    """The DequantizeLinear behind `name`, through data movement and arithmetic."""
    node = view.producer.get(name)
    while node is not None and node.op_type in _ARITHMETIC | MOVEMENT_OPS:
        nexts = (view.producer.get(x) for x in node.input if x and not view.is_constant(x))
        node = next((n for n in nexts if n is not None), None)
    return node if node is not None and node.op_type in DEQUANTIZE_OPS else None
