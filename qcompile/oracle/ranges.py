"""The overflow proof: the interval of every tensor of an integer graph, and how far it is from the ends of its type.

A bound holds for every input, not for sampled ones: inputs take all codes of their type, sums of products are bounded from
the actual weights (per output channel, including every partial sum in any order), tables by their entries, everything else
by interval arithmetic in Python integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log2
from typing import Any

import numpy as np
import onnx
from onnx import helper

from qcompile.oracle import interval
from qcompile.oracle.cost import Cost, LayerCost, layer_cost
from qcompile.oracle.graph import IntegerGraph, Op, integer_graph
from qcompile.oracle.interval import Range, between
from qcompile.oracle.scene import Scene, Shape, Unbounded
from qcompile.oracle.transfer import TRANSFERS

KERNELS = frozenset({"compare", "sum"})
_COMPARING = frozenset({"Clip", "Max", "Min", "ReduceMax", "ReduceMin", "Sign"})
_DOUBLE = 1 << 53
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "ReduceSum", "ConvInteger", "MatMulInteger", "MatMul"})


@dataclass(frozen=True)
class Bound:
    """What one operator can make: `lo` .. `hi`, the bits that this needs, and log2(end of the type / bound).

    For ConvInteger and MatMulInteger it covers every partial sum; the sums inside QLinearConv and QLinearMatMul are listed as
    such.  The margin of adding a constant is that of the other operand in what the constant leaves free (2^62 takes half of
    int64 by design, whatever is added to it).
    """

    node: str
    op: str
    dtype: str
    lo: int
    hi: int
    bits: int
    margin_bits: float

    def to_json(self) -> dict[str, Any]:
        """The keys node, op, dtype, lo, hi, bits, margin_bits."""
        return dict(vars(self))


@dataclass(frozen=True)
class Problem:
    """What could not be proven at a node.

    `kind`: overflow32, overflow64, shift, cast, zero, index or unbounded; compare and sum are kernels of ONNX Runtime that
    are wrong on numbers this large (see `_kernel_problems`).
    """

    kind: str
    node: str
    message: str


@dataclass(frozen=True)
class Proof:
    """A bound for each operator, what stands in the way, what is assumed about inputs and unknown axes, what layers cost."""

    bounds: tuple[Bound, ...]
    problems: tuple[Problem, ...]
    assumptions: tuple[str, ...]
    layers: tuple[LayerCost, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every operator is bounded and nothing can overflow."""
        return all(p.kind in KERNELS for p in self.problems)

    @property
    def arithmetic(self) -> tuple[Bound, ...]:
        """Bounds of the operators that can overflow."""
        return tuple(b for b in self.bounds if b.op in _ARITHMETIC)

    @property
    def worst(self) -> Bound | None:
        """The arithmetic operator nearest to the end of its type."""
        return min(self.arithmetic, key=lambda b: b.margin_bits, default=None)

    @property
    def cost(self) -> Cost:
        """What the layers cost a sample."""
        return Cost(self.layers)

    def to_json(self) -> dict[str, Any]:
        """The keys proof_complete, assumptions, worst, proof (a list of bounds, see `Bound.to_json`), cost."""
        worst = None if self.worst is None else self.worst.to_json()
        found = {"proof_complete": self.complete, "assumptions": list(self.assumptions), "worst": worst}
        return {**found, "cost": self.cost.to_json(), "proof": [b.to_json() for b in self.bounds]}


def prove(model: onnx.ModelProto, base_dir: str = "") -> Proof:
    """Bound every tensor of an integer-only model.

    Raises:
        ModelError: the model's borders are not Q and DQ (see `integer_graph`).
    """
    graph = integer_graph(model, base_dir)
    types, shapes = inferred(model)
    types |= {name: array.dtype for name, array in graph.constants.items()}
    makers = {out: op for op in graph.ops for out in op.outputs}
    scene = Scene(_start(graph, types), graph.constants, shapes, makers, frozenset(graph.inputs))
    bounds, problems, layers = list[Bound](), list[Problem](), list[LayerCost | None]()
    for op in graph.ops:
        bounds += _visit(scene, op, types)
        problems += [Problem(kind, op.name, f"{op.type}: {message}") for kind, message in scene.problems]
        scene.problems.clear()
        layers.append(layer_cost(scene, op))
    return Proof(tuple(bounds), tuple(problems), tuple(sorted(scene.assumptions)), tuple(x for x in layers if x is not None))


def inferred(model: onnx.ModelProto) -> tuple[dict[str, np.dtype[Any]], dict[str, Shape]]:
    """Types and shapes of all tensors, as far as they can be inferred."""
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception:  # onnx raises bare RuntimeErrors; what is recorded may be enough
        graph = model.graph
    infos = [v for v in (*graph.value_info, *graph.input, *graph.output) if v.type.tensor_type.elem_type]
    types = {v.name: np.dtype(helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)) for v in infos}
    shapes = {v.name: _shape(v) for v in infos if v.type.tensor_type.HasField("shape")}
    return types, shapes | {t.name: tuple(t.dims) for t in graph.initializer}


def _shape(info: onnx.ValueInfoProto) -> Shape:
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in info.type.tensor_type.shape.dim)


def _start(graph: IntegerGraph, types: dict[str, np.dtype[Any]]) -> dict[str, Range]:
    """Constants are known; inputs hold anything that their type holds."""
    ranges = {name: interval.constant(a) for name, a in graph.constants.items() if a.dtype.kind in "iub"}
    ranges |= {e.codes: full(e.dtype) for e in graph.entries}
    return ranges | {name: full(types.get(name, np.dtype(np.int64))) for name in graph.inputs}


def full(dtype: np.dtype[Any]) -> Range:
    """Everything that a type holds."""
    return between(0, 1) if dtype.kind == "b" else between(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))


def _visit(scene: Scene, op: Op, types: dict[str, np.dtype[Any]]) -> list[Bound]:
    """Set the ranges of the outputs, and answer their bounds; after a problem the type's own range goes on."""
    names = [name for name in op.outputs if name]
    unknown = [n for n in names if n not in types]
    dtype = types.get(names[0], np.dtype(np.int64))
    try:
        if unknown:
            raise Unbounded(f"the type of {unknown[0]!r} is unknown")
        found = TRANSFERS[op.type](scene, op)
    except (Unbounded, KeyError) as error:
        reason = error if isinstance(error, Unbounded) else f"no bound is known for what it reads or for {op.type}"
        scene.problem("unbounded", str(reason))
        scene.ranges |= dict.fromkeys(names, full(dtype))
        return []
    stored = _store(scene, op, found, dtype)
    _kernel_problems(scene, op, dtype)
    scene.ranges |= dict.fromkeys(names, stored)
    inside = [_bound(scene, inner, total, np.dtype(np.int32)) for inner, total in scene.sums]
    scene.sums.clear()
    return [*inside, _bound(scene, op, found, dtype)]


def _store(scene: Scene, op: Op, found: Range, dtype: np.dtype[Any]) -> Range:
    limits = full(dtype)
    if dtype.kind == "b" or found.within(limits.low, limits.high):
        return found if dtype.kind != "b" else limits
    kind = "cast" if op.type == "Cast" else "overflow64" if dtype.itemsize == 8 else "overflow32"
    scene.problem(kind, f"its result can be {found.low} .. {found.high}, which {dtype} cannot hold")
    return limits


def _kernel_problems(scene: Scene, op: Op, dtype: np.dtype[Any]) -> None:
    """ONNX Runtime 1.31 on x86-64 compares int64 wrongly where the upper halves are equal and bit 31 differs (Eigen's SSE2 code,
    ORT pull request 25280), and sums int64 in double.  Neither shows below 2^31 and 2^53; uint64 is compared right."""
    if dtype != np.int64:
        return
    read = [scene.ranges[name] for name in op.inputs[: 1 if op.type.startswith("Reduce") else None] if name]
    if op.type in _COMPARING and not all(r.within(-(1 << 31), (1 << 31) - 1) for r in read):
        widest = max(read, key=lambda r: max(abs(r.low), abs(r.high)))
        scene.problem("compare", f"it compares int64 numbers in {widest.low} .. {widest.high}")
    if op.type == "ReduceSum" and (reach := _reach(scene, op)) > _DOUBLE:
        scene.problem("sum", f"its terms add up to {reach} in magnitude")


def _reach(scene: Scene, op: Op) -> int:
    """A bound of every partial sum of magnitudes."""
    first = op.inputs[0]
    kept, largest = scene.ranges[first], max(abs(scene.ranges[first].low), abs(scene.ranges[first].high))
    scene.ranges[first] = between(-largest, largest)
    reach = TRANSFERS[op.type](scene, op).high
    scene.ranges[first] = kept
    return reach


def _bound(scene: Scene, op: Op, found: Range, dtype: np.dtype[Any]) -> Bound:
    low, high = found.low, found.high
    signed = low < 0 or dtype.kind == "i"
    bits = max(high.bit_length(), (~low).bit_length() if low < 0 else 0) + signed
    return Bound(op.name, op.type, str(dtype), low, high, bits, _margin(low, high, dtype, _offset(scene, op)))


def _offset(scene: Scene, op: Op) -> int:
    """The constant that an Add adds, if it is one number."""
    known = [c for slot in range(2) if op.type == "Add" and (c := scene.constant(op, slot)) is not None and c.size == 1]
    return int(known[0].reshape(())) if len(known) == 1 else 0


def _margin(low: int, high: int, dtype: np.dtype[Any], offset: int) -> float:
    """log2(room / bound) on the tighter side, in hundredths rounded down; negative when the bound lies beyond the type."""
    limits = full(dtype)
    sides = [(limits.high + 1 - offset, high - offset), (offset - limits.low, offset - low)]
    moving = [log2(max(room, 1) / bound) for room, bound in sides if bound > 0]
    return floor(100 * min(moving)) / 100 if moving else float(dtype.itemsize * 8)
