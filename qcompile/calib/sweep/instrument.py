"""A copy of a model whose outputs are the probes' answers: reduced by ONNX Runtime's own kernels where they can be.

MinMax, AbsMax     of an axis: ReduceMin, ReduceMax over the other axes
Extremes           the same over the last axis, one number a row
Moments            ReduceSum, ReduceSumSquare: float32 sums of one batch
everything else    the tensor itself

Extremes of a whole tensor, histograms and second moments take the tensor itself.  ReduceMin and ReduceMax over all axes are
slower than NumPy's, which run on other threads while the next batch is inferred.  Mul, Floor and Cast to codes in the graph
each walk through memory, while outside all passes run on blocks that stay in the cache.  A Gemm's product [C, C] is often
larger than the rows it is made of, has to be stored and added up, and costs twice the multiplications of a symmetric update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from qcompile.calib.observe import Observer, Probe
from qcompile.calib.observe.extrema import AbsMax, MinMax
from qcompile.calib.observe.histogram import Histogram
from qcompile.calib.observe.rows import Extremes
from qcompile.calib.observe.stat import other_axes
from qcompile.calib.observe.sums import Moments, SecondMoment
from qcompile.calib.sweep import graphs
from qcompile.calib.sweep.finite import blind_tensors
from qcompile.errors import ModelError
from qcompile.ir.model import Model

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
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


@dataclass
class Instrumented:
    """The graph with its reductions, and which outputs answer what."""

    model: Model
    extremes: dict[Key, ExtremeNames] = field(default_factory=dict[Key, ExtremeNames])
    sums: dict[Key, SumNames] = field(default_factory=dict[Key, SumNames])
    raw: dict[str, str] = field(default_factory=dict[str, str])
    unchecked: set[str] = field(default_factory=set[str])

    def output(self, value: ir.Value) -> str:
        """Let the value leave the session."""
        self.model.graph.outputs.append(value)
        return str(value.name)


def instrument(model: Model, probes: Sequence[Probe]) -> Instrumented:
    """Reductions for `probes`, without the nodes that nothing needs any more.

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
    whole = {p for p in probes if not reducible(values[p.tensor], p.observer)}
    raw = dict.fromkeys(t for p in probes if p in whole for t in (p.tensor, *_companions(p.observer)))
    checked = [p for p in probes if not getattr(p.observer, "unchecked", False)]
    made.unchecked = raw.keys() - {t for p in checked for t in (p.tensor, *_companions(p.observer))}
    made.unchecked |= {p.tensor for p in whole if isinstance(p.observer, Histogram | MinMax | AbsMax)}  # extremes show NaN
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
    if isinstance(observer, Extremes):
        return len(value.shape) > 1
    return isinstance(observer, Moments) or (isinstance(observer, MinMax | AbsMax) and observer.axis is not None)


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
        case _:
            raise AssertionError(f"{probe.observer} has no reduction in the graph")


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


def _wide(made: Instrumented, value: ir.Value) -> ir.Value:
    """float16 as float32: the kernels' sums and scaled values would overflow."""
    if value.dtype != ir.DataType.FLOAT16:
        return value
    tag = f"qcompile_wide_{len(made.sums)}"
    return graphs.cast(made.model, value, ir.DataType.FLOAT, tag)
