"""One pass over the data that answers many probes, near the speed of inference.

Min-max statistics are reduced inside the graph by ONNX Runtime's own kernels, so that only scalars leave the session;
tensors that another observer needs are fetched once a batch for all their observers.  Statistics are merged batch
by batch: memory does not grow with the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from qcompile.calib.data import Dataset, fixed_batch
from qcompile.calib.observers import AbsMax, MinMax, MinMaxStat, Observer, Probe, Rows, RowsStat, Stat, absmax_of, other_axes
from qcompile.errors import DataError, ModelError
from qcompile.ir.model import Model
from qcompile.runtime.session import batch_length, make_session, run

DEFAULT_BATCH = 8
_WAITING_ROWS = 128
_SPREADS_NAN = frozenset({
    "Add", "BatchNormalization", "Cast", "Conv", "Div", "Erf", "Exp", "Flatten", "Gelu", "Gemm", "GlobalAveragePool", "Identity",
    "LayerNormalization", "MatMul", "Mul", "Pow", "ReduceMean", "Reshape", "Sigmoid", "Softmax", "Sqrt", "Squeeze", "Sub", "Tanh",
    "Transpose", "Unsqueeze",
})  # fmt: skip


@dataclass(frozen=True)
class _Reduced:
    """Outputs of the sweep graph that hold one tensor's extremes, and its sum (the kernels skip NaN, a sum does not).

    There is no sum where NaN would show in a later tensor that is checked.
    """

    tensor: str
    axis: int | None
    lo: str
    hi: str
    total: str | None


@dataclass
class _Sweep:
    """The graph with its probes, and which output answers what."""

    model: Model
    reduced: list[_Reduced]
    raw: dict[str, str]


def sweep(
    model: Model,
    data: Dataset,
    probes: Sequence[Probe],
    *,
    batch: int | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Probe, Stat]:
    """Run `data` through `model` once and return every probe's statistic.

    Args:
        batch: samples a run (default 8); a model with a fixed batch axis decides itself, and a rest that does
            not fill it is left out.
        threads: of ONNX Runtime.
        progress: called with (samples done, samples in all) after each run.

    Raises:
        ModelError: a probed tensor is not in the main graph, or ONNX Runtime cannot load the graph.
        DataError: NaN or infinite values in a probed tensor; no samples, or fewer than the fixed batch.
    """
    if not probes:
        return {}
    size = batch_size(model, len(data), batch)
    plan = _instrument(model, probes)
    names = [n for r in plan.reduced for n in (r.lo, r.hi, r.total) if n is not None] + list(plan.raw.values())
    session = make_session(plan.model.to_proto().SerializeToString(), threads=threads)
    stats: dict[Probe, Stat] = {p: p.observer.empty() for p in dict.fromkeys(probes)}
    wanted = {i.name for i in session.get_inputs()}
    waiting: dict[Probe, list[RowsStat]] = {}
    done, fixed = 0, fixed_batch(model.inputs())
    for feeds in data.batches(size):
        held = batch_length(feeds)
        if fixed is not None and held != fixed:
            break
        used = {k: v for k, v in feeds.items() if k in wanted}
        found = dict(zip(names, run(session, used, names, done), strict=True))
        _merge(stats, waiting, _answers(plan, found, stats, done, held, model, used))
        done += held
        if progress is not None:
            progress(done, len(data))
    for probe in waiting:
        _flush(stats, waiting, probe)
    return stats


def batch_size(model: Model, available: int, batch: int | None = None) -> int:
    """Samples a run: the model's fixed batch axis, else `batch`, else 8.

    Raises:
        DataError: fewer samples than one run needs.
    """
    fixed = fixed_batch(model.inputs())
    least = fixed or 1
    if available < least:
        raise DataError(f"the data holds {available} samples and the model needs {least} a run; give more samples")
    return fixed or min(batch or DEFAULT_BATCH, available)


def _merge(stats: dict[Probe, Stat], waiting: dict[Probe, list[RowsStat]], found: Iterable[tuple[Probe, Stat]]) -> None:
    """Into what is known; the few rows that a batch adds to a sample wait for more, since a merge copies the sample."""
    for probe, stat in found:
        if not isinstance(stat, RowsStat):
            stats[probe] = stats[probe].merge(stat)
            continue
        parts = waiting.setdefault(probe, [])
        parts.append(stat)
        if sum(len(p.keys) for p in parts) >= _WAITING_ROWS:
            _flush(stats, waiting, probe)


def _flush(stats: dict[Probe, Stat], waiting: dict[Probe, list[RowsStat]], probe: Probe) -> None:
    known = stats[probe]
    assert isinstance(known, RowsStat)
    stats[probe] = known.merge_all(waiting[probe])
    waiting[probe] = []


def _answers(
    plan: _Sweep,
    found: dict[str, NDArray[Any]],
    stats: dict[Probe, Stat],
    first: int,
    held: int,
    model: Model,
    feeds: dict[str, NDArray[Any]],
) -> list[tuple[Probe, Stat]]:
    """This batch's statistic of every probe."""
    extremes = {(r.tensor, r.axis): _extremes(r, found, first, model, feeds) for r in plan.reduced}
    for tensor, output in plan.raw.items():
        _require_finite(model, tensor, found[output], first)
    answers: list[tuple[Probe, Stat]] = []
    for probe, known in stats.items():
        observer = probe.observer
        if probe.tensor in plan.raw:
            answers.append((probe, _observe(observer, found[plan.raw[probe.tensor]], first, held, known)))
        elif isinstance(observer, MinMax | AbsMax):
            stat = extremes[probe.tensor, observer.axis]
            answers.append((probe, absmax_of(stat) if isinstance(observer, AbsMax) else stat))
    return answers


def _observe(observer: Observer, array: NDArray[Any], first: int, held: int, known: Stat) -> Stat:
    """A sample of rows copies only those that can enter it."""
    if isinstance(observer, Rows) and isinstance(known, RowsStat):
        return observer.observe(array, first, held, known)
    return observer.observe(array, first, held)


def _extremes(
    r: _Reduced, found: dict[str, NDArray[Any]], first: int, model: Model, feeds: dict[str, NDArray[Any]]
) -> MinMaxStat:
    lo, hi = (np.asarray(found[n], np.float64) for n in (r.lo, r.hi))
    total = found[r.total] if r.total is not None else 0.0
    if not (np.isfinite(lo).all() and np.isfinite(hi).all() and np.isfinite(total).all()):
        # The sum of finite values may overflow (float16): look at the tensor itself before complaining.
        _require_finite(model, r.tensor, _fetch(model, r.tensor, feeds, first), first)
    return MinMaxStat(lo, hi)


def _fetch(model: Model, tensor: str, feeds: dict[str, NDArray[Any]], first: int) -> NDArray[Any]:
    """The raw tensor of one batch, by a session of its own."""
    plan = _instrument(model, [Probe(tensor, _Raw())])
    session = make_session(plan.model.to_proto().SerializeToString())
    wanted = {i.name for i in session.get_inputs()}
    return run(session, {k: v for k, v in feeds.items() if k in wanted}, None, first)[0]


@dataclass(frozen=True)
class _Raw:
    """Stands for any observer that needs the tensor itself."""

    def empty(self) -> NoReturn:
        raise NotImplementedError

    def observe(self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None) -> NoReturn:
        raise NotImplementedError


def _require_finite(model: Model, tensor: str, array: NDArray[Any], first: int) -> None:
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
    node = _values(model)[tensor].producer()
    maker = f"made by node {node.name!r} ({node.op_type})" if node is not None else "an input of the model"
    raise DataError(
        f"tensor {tensor!r}, {maker}, has {what} from sample {sample} on; "
        "check that sample's inputs and preprocessing, or keep that node in float with --keep-float"
    )


def _values(model: Model) -> dict[str, ir.Value]:
    """Every value of the main graph by name."""
    graph = model.graph
    named = {str(v.name): v for v in (*graph.inputs, *graph.initializers.values())}
    return named | {str(v.name): v for node in graph for v in node.outputs}


def _instrument(model: Model, probes: Sequence[Probe]) -> _Sweep:
    """A copy of the graph whose outputs are the probes' answers, without the nodes that nothing needs any more."""
    copy = model.clone()
    values = _values(copy)
    _require_known(values, probes)
    if any(values[p.tensor].shape is None for p in probes):
        ShapeInferencePass()(copy.ir)
        values = _values(copy)
    raw_tensors = list(dict.fromkeys(p.tensor for p in probes if _needs_raw(values[p.tensor], p.observer)))
    axes = dict.fromkeys((p.tensor, _axis(p.observer)) for p in probes if p.tensor not in raw_tensors)
    copy.graph.outputs.clear()
    blind = _blind({*raw_tensors, *(t for t, _ in axes)}, values)
    reduced = [_add_reductions(copy, values[tensor], axis, f"{i}", tensor in blind) for i, (tensor, axis) in enumerate(axes)]
    raw = {tensor: _add_output(copy, values[tensor]) for tensor in raw_tensors}
    RemoveUnusedNodesPass()(copy.ir)
    return _Sweep(copy, reduced, raw)


def _require_known(values: dict[str, ir.Value], probes: Sequence[Probe]) -> None:
    for probe in probes:
        if probe.tensor not in values:
            raise ModelError(f"there is no tensor {probe.tensor!r} in the main graph; list the tensors with: qcompile inspect")


def _needs_raw(value: ir.Value, observer: Observer) -> bool:
    """In-graph reduction answers extremes of floats of known rank; the rest needs the tensor itself."""
    if not isinstance(observer, MinMax | AbsMax):
        return True
    if value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE):
        return True
    return value.shape is None or len(value.shape) == 0 or 0 in value.shape


def _axis(observer: Observer) -> int | None:
    return observer.axis if isinstance(observer, MinMax | AbsMax) else None


def _blind(probed: set[str], values: dict[str, ir.Value]) -> set[str]:
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


def _add_reductions(model: Model, value: ir.Value, axis: int | None, tag: str, check: bool) -> _Reduced:
    assert value.shape is not None
    axes = other_axes(len(value.shape), axis)
    lo = _reduce(model, "ReduceMin", value, axes, f"qcompile_lo_{tag}")
    hi = _reduce(model, "ReduceMax", value, axes, f"qcompile_hi_{tag}")
    total = _reduce(model, "ReduceSum", value, tuple(range(len(value.shape))), f"qcompile_sum_{tag}") if check else None
    return _Reduced(str(value.name), axis, lo, hi, total)


def _reduce(model: Model, op: str, value: ir.Value, axes: tuple[int, ...], name: str) -> str:
    """Add one Reduce node; its axes are an input from opset 18 on (13 for ReduceSum), an attribute before."""
    attributes: dict[str, Any] = {"keepdims": 0}
    inputs = [value]
    if axes and model.opset >= (13 if op == "ReduceSum" else 18):
        inputs.append(_constant(model, np.array(axes, np.int64), f"{name}_axes"))
    elif axes:
        attributes["axes"] = list(axes)
    if not axes:  # nothing to reduce: a vector, observed per element
        op, attributes = "Identity", {}
    return _append(model, op, inputs, attributes, value, name)


def _add_output(model: Model, value: ir.Value) -> str:
    """Expose a tensor; inputs and initializers cannot be outputs themselves and get a new name."""
    if value.producer() is not None:
        model.graph.outputs.append(value)
        return str(value.name)
    return _append(model, "Identity", [value], {}, value, f"qcompile_raw_{len(model.graph.outputs)}")


def _append(model: Model, op: str, inputs: list[ir.Value], attributes: dict[str, Any], like: ir.Value, name: str) -> str:
    node = ir.node(op, inputs, attributes, num_outputs=1, name=name)
    out = node.outputs[0]
    out.name, out.type = name, like.type
    model.graph.append(node)
    model.graph.outputs.append(out)
    return name


def _constant(model: Model, array: NDArray[Any], name: str) -> ir.Value:
    value = ir.val(name, const_value=ir.Tensor(array, name=name))
    model.graph.register_initializer(value)
    return value
