"""A copy of a model whose outputs are the probes' answers: reduced by ONNX Runtime's own kernels where they can be.

MinMax, AbsMax     ReduceMin, ReduceMax over the other axes
Extremes           the same over the last axis, one number a row
Moments            ReduceSum, ReduceSumSquare: float32 sums of one batch
SecondMoment       Gemm(X, X, transA=1) of X flattened to rows: a float32 product of one batch
Histogram          codes floor(x * 2^-e) in int32, exact, with 2^-e fed as a scalar, and the extremes
everything else    the tensor itself
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from qcompile.calib import graphs
from qcompile.calib.extrema import AbsMax, MinMax
from qcompile.calib.finite import blind_tensors
from qcompile.calib.histogram import Histogram
from qcompile.calib.observers import Observer, Probe
from qcompile.calib.rows import Extremes
from qcompile.calib.stat import other_axes
from qcompile.calib.sums import Moments, SecondMoment
from qcompile.errors import ModelError
from qcompile.ir.model import Model

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_NOT_NEGATIVE = frozenset({"Abs", "Exp", "Relu", "Sigmoid", "Softmax", "Sqrt"})
_ROWS = "rows"

Key = tuple[str, int | str | None]
"""A tensor and what is kept of it: None nothing, an axis, or the rows of the last axis."""


@dataclass(frozen=True)
class ExtremeNames:
    """Outputs that hold extremes, and the sum (the kernels skip NaN, a sum does not; None where NaN shows elsewhere)."""

    lo: str
    hi: str
    total: str | None


@dataclass(frozen=True)
class SumNames:
    """Outputs that hold a batch's sum, sum of squares and number of values."""

    total: str
    squares: str
    size: str


@dataclass(frozen=True)
class ProductNames:
    """Outputs that hold X^T diag(w) X and the number of rows with w != 0."""

    xtx: str
    rows: str


@dataclass(frozen=True)
class CodeNames:
    """The input that takes 2^-e (of `dtype`) and the output that holds floor(x * 2^-e)."""

    scale: str
    dtype: np.dtype[np.floating]
    codes: str


@dataclass
class Instrumented:
    """The graph with its reductions, and which outputs answer what."""

    model: Model
    extremes: dict[Key, ExtremeNames] = field(default_factory=dict[Key, ExtremeNames])
    sums: dict[Key, SumNames] = field(default_factory=dict[Key, SumNames])
    products: dict[tuple[str, str | None], ProductNames] = field(default_factory=dict[tuple[str, str | None], ProductNames])
    codes: dict[str, CodeNames] = field(default_factory=dict[str, CodeNames])
    raw: dict[str, str] = field(default_factory=dict[str, str])
    unchecked: set[str] = field(default_factory=set[str])

    def output(self, value: ir.Value) -> str:
        """Let the value leave the session."""
        self.model.graph.outputs.append(value)
        return str(value.name)


def instrument(model: Model, probes: Sequence[Probe], fetched: Collection[str] = ()) -> Instrumented:
    """Reductions for `probes`, without the nodes that nothing needs any more; the tensors `fetched` leave as they are.

    Raises:
        ModelError: a probed tensor is not in the main graph.
    """
    copy = model.clone()
    values = graphs.named_values(copy)
    _require_known(values, probes)
    if any(values[p.tensor].shape is None for p in probes):
        ShapeInferencePass()(copy.ir)
        values = graphs.named_values(copy)
    made = Instrumented(copy)
    copy.graph.outputs.clear()
    whole = {p for p in probes if p.tensor in fetched or not reducible(values[p.tensor], p.observer)}
    raw = dict.fromkeys(t for p in probes if p in whole for t in (p.tensor, *_companions(p.observer)))
    checked = [p for p in probes if not getattr(p.observer, "unchecked", False)]
    made.unchecked = raw.keys() - {t for p in checked for t in (p.tensor, *_companions(p.observer))}
    blind = blind_tensors({p.tensor for p in checked}, values) - set(raw)
    for p in dict.fromkeys(probes):
        if p not in whole:
            _add(made, values, p, p.tensor in blind)
    made.raw.update({tensor: graphs.expose(copy, values[tensor]) for tensor in raw})
    RemoveUnusedNodesPass()(copy.ir)
    return made


def reducible(value: ir.Value, observer: Observer) -> bool:
    """In-graph reduction answers for floats of known rank; the rest needs the tensor itself."""
    if value.dtype not in _FLOATS or value.shape is None or len(value.shape) == 0 or 0 in value.shape:
        return False
    if isinstance(observer, Extremes | SecondMoment):
        return len(value.shape) > 1
    return isinstance(observer, MinMax | AbsMax | Moments | Histogram)


def _companions(observer: Observer) -> tuple[str, ...]:
    """Other tensors that an observer reads."""
    return (observer.weights,) if isinstance(observer, SecondMoment) and observer.weights is not None else ()


def _require_known(values: dict[str, ir.Value], probes: Sequence[Probe]) -> None:
    for tensor in (t for p in probes for t in (p.tensor, *_companions(p.observer))):
        if tensor not in values:
            raise ModelError(f"there is no tensor {tensor!r} in the main graph; list the tensors with: qcompile inspect")


def _add(made: Instrumented, values: dict[str, ir.Value], probe: Probe, check: bool) -> None:
    value = values[probe.tensor]
    match probe.observer:
        case MinMax(axis) | AbsMax(axis):
            _add_extremes(made, value, axis, check)
        case Extremes():
            _add_extremes(made, value, _ROWS, check)
        case Moments(axis):
            _add_sums(made, value, axis)
        case SecondMoment(weights):
            _add_product(made, value, None if weights is None else values[weights])
        case _:
            _add_extremes(made, value, None, check)
            _add_codes(made, value)


def _reduced_axes(value: ir.Value, keep: int | str | None) -> tuple[int, ...]:
    assert value.shape is not None
    rank = len(value.shape)
    return (rank - 1,) if isinstance(keep, str) else other_axes(rank, keep)


def _add_extremes(made: Instrumented, value: ir.Value, keep: int | str | None, check: bool) -> None:
    key = (str(value.name), keep)
    if key in made.extremes:
        return
    assert value.shape is not None
    axes, tag = _reduced_axes(value, keep), len(made.extremes)
    lo, hi = (graphs.reduce(made.model, f"Reduce{op}", value, axes, f"qcompile_{op}_{tag}") for op in ("Min", "Max"))
    total = None
    if check:
        everything = range(len(value.shape))
        total = made.output(graphs.reduce(made.model, "ReduceSum", value, everything, f"qcompile_check_{tag}"))
    made.extremes[key] = ExtremeNames(made.output(lo), made.output(hi), total)


def _add_sums(made: Instrumented, value: ir.Value, keep: int | None) -> None:
    key, tag, model = (str(value.name), keep), len(made.sums), made.model
    if key in made.sums:
        return
    axes = _reduced_axes(value, keep)
    wide = _wide(made, value)
    total = graphs.reduce(model, "ReduceSum", wide, axes, f"qcompile_sum_{tag}")
    squares = graphs.reduce(model, "ReduceSumSquare", wide, axes, f"qcompile_squares_{tag}")
    size = graphs.append(model, "Size", [value], f"qcompile_size_{tag}", ir.DataType.INT64)
    made.sums[key] = SumNames(made.output(total), made.output(squares), made.output(size))


def _add_product(made: Instrumented, value: ir.Value, weights: ir.Value | None) -> None:
    assert value.shape is not None
    model, tag = made.model, len(made.products)
    wide = _wide(made, value)
    rows = graphs.append(model, "Flatten", [wide], f"qcompile_rows_{tag}", axis=len(value.shape) - 1)
    left, count = rows, graphs.append(model, "Shape", [rows], f"qcompile_count_{tag}", ir.DataType.INT64)
    if weights is not None:
        left, count = _weighted(made, rows, weights, tag)
    xtx = graphs.append(model, "Gemm", [left, rows], f"qcompile_xtx_{tag}", transA=1)
    key = (str(value.name), None if weights is None else str(weights.name))
    made.products[key] = ProductNames(made.output(xtx), made.output(count))


def _weighted(made: Instrumented, rows: ir.Value, weights: ir.Value, tag: int) -> tuple[ir.Value, ir.Value]:
    """Rows times their weights, and the number of rows with a weight."""
    model = made.model
    assert rows.dtype is not None
    column = graphs.constant(model, np.array([-1, 1], np.int64), f"qcompile_column_{tag}")
    flat = graphs.append(model, "Reshape", [weights, column], f"qcompile_weights_{tag}")
    left = graphs.append(
        model, "Mul", [rows, graphs.cast(model, flat, rows.dtype, f"qcompile_float_{tag}")], f"qcompile_left_{tag}"
    )
    used = graphs.cast(
        model, graphs.cast(model, flat, ir.DataType.BOOL, f"qcompile_used_{tag}"), ir.DataType.INT64, f"qcompile_ones_{tag}"
    )
    return left, graphs.reduce(model, "ReduceSum", used, (0,), f"qcompile_count_w_{tag}")


def _add_codes(made: Instrumented, value: ir.Value) -> None:
    name = str(value.name)
    if name in made.codes:
        return
    model, tag, wide = made.model, len(made.codes), _wide(made, value)
    assert wide.dtype is not None
    scale = graphs.graph_input(model, wide.dtype, f"qcompile_scale_{tag}")
    scaled = graphs.append(model, "Mul", [wide, scale], f"qcompile_scaled_{tag}")
    if not _not_negative(value):  # Cast truncates towards zero: the same for what is not negative
        scaled = graphs.append(model, "Floor", [scaled], f"qcompile_floor_{tag}")
    codes = graphs.cast(model, scaled, ir.DataType.INT32, f"qcompile_codes_{tag}")
    made.codes[name] = CodeNames(str(scale.name), wide.dtype.numpy(), made.output(codes))


def _not_negative(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.domain == "" and producer.op_type in _NOT_NEGATIVE


def _wide(made: Instrumented, value: ir.Value) -> ir.Value:
    """float16 as float32: the kernels' sums and scaled values would overflow."""
    if value.dtype != ir.DataType.FLOAT16:
        return value
    tag = f"qcompile_wide_{len(made.sums)}_{len(made.products)}_{len(made.codes)}"
    return graphs.cast(made.model, value, ir.DataType.FLOAT, tag)
