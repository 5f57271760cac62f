"""A copy of a model whose outputs are the probes' answers: reduced by ONNX Runtime's own kernels where they can be.

Which observers are reduced in the graph, and how, they say themselves (`Observer.in_graph`); the others take the tensor
itself.  Mul, Floor and Cast to codes in the graph each walk through memory, while outside all passes run on blocks that
stay in the cache, on other threads while the next batch is inferred (ADR 003).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qcompile.calib.observe import Observer, Probe, Reduction
from qcompile.calib.sweep import graphs
from qcompile.calib.sweep.finite import blind_tensors
from qcompile.errors import ModelError
from qcompile.ir.infer import infer_shapes
from qcompile.ir.masks import masked_tensors
from qcompile.ir.model import Model

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class Reduced:
    """Outputs of a reduction, and the tensor's sum (the kernels of extremes skip NaN, a sum does not; None where NaN shows)."""

    outputs: tuple[str, ...]
    check: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All outputs."""
        return self.outputs if self.check is None else (*self.outputs, self.check)


@dataclass
class Instrumented:
    """The graph with its reductions, and which outputs answer what; `searched` raw tensors are looked through for NaN.

    `masked` tensors may hold the infinities of a mask that is an input: they are read raw, and their finite values count.
    """

    model: Model
    reductions: dict[tuple[str, Reduction], Reduced] = field(default_factory=dict[tuple[str, Reduction], Reduced])
    raw: dict[str, str] = field(default_factory=dict[str, str])
    reduced: dict[Probe, Reduced] = field(default_factory=dict[Probe, Reduced])
    searched: set[str] = field(default_factory=set[str])
    masked: frozenset[str] = frozenset()

    def output(self, value: ir.Value) -> str:
        """Let the value leave the session."""
        self.model.graph.outputs.append(value)
        return str(value.name)

    def outputs_of(self, probe: Probe) -> tuple[str, ...]:
        """What a probe's observer gets."""
        if probe in self.reduced:
            return self.reduced[probe].outputs
        return tuple(self.raw[tensor] for tensor in tensors_of(probe))


def tensors_of(probe: Probe) -> tuple[str, ...]:
    """The tensors that a probe's observer reads."""
    return (probe.tensor, *probe.observer.reads)


def instrument(model: Model, probes: Sequence[Probe]) -> Instrumented:
    """Reductions for `probes`, without the nodes that nothing needs any more.

    Raises:
        ModelError: a probed tensor is not in the main graph.
    """
    copy = model.clone()
    values = graphs.named_values(copy)
    _require_known(values, probes)
    if any(values[p.tensor].shape is None for p in probes):
        infer_shapes(copy)
        values = graphs.named_values(copy)
    made = Instrumented(copy)
    copy.graph.outputs.clear()
    made.masked = masked_tensors(copy.graph)
    wanted = {p: None if p.tensor in made.masked else _reduction(values[p.tensor], p.observer) for p in probes}
    whole = [p for p, reduction in wanted.items() if reduction is None]
    raw = dict.fromkeys(t for p in whole for t in tensors_of(p))
    made.searched = _searched(raw, probes, whole) - made.masked
    blind = blind_tensors({p.tensor for p in probes if p.observer.infinities != "allowed"}, values) - set(raw)
    for p, reduction in wanted.items():
        if reduction is not None:
            made.reduced[p] = _reduced(made, values[p.tensor], reduction, p.tensor in blind and not reduction.sums)
    made.raw.update({tensor: graphs.expose(copy, values[tensor]) for tensor in raw})
    RemoveUnusedNodesPass()(copy.ir)
    return made


def raw_tensor(model: Model, tensor: str) -> Model:
    """A copy whose only output is a tensor, without the nodes that it does not need."""
    copy = model.clone()
    copy.graph.outputs.clear()
    graphs.expose(copy, graphs.named_values(copy)[tensor])
    RemoveUnusedNodesPass()(copy.ir)
    return copy


def _reduction(value: ir.Value, observer: Observer) -> Reduction | None:
    """In-graph reduction answers for floats of known rank; the rest needs the tensor itself."""
    if value.dtype not in _FLOATS or value.shape is None or len(value.shape) == 0 or 0 in value.shape:
        return None
    return observer.in_graph(len(value.shape))


def _searched(raw: dict[str, None], probes: Sequence[Probe], whole: Sequence[Probe]) -> set[str]:
    """The raw tensors that a probe wants finite, unless an observer of them refuses by itself what is not."""
    wanted = {t for p in probes if p.observer.infinities != "allowed" for t in tensors_of(p)}
    return (raw.keys() & wanted) - {p.tensor for p in whole if p.observer.infinities == "refused"}


def _require_known(values: dict[str, ir.Value], probes: Sequence[Probe]) -> None:
    for tensor in (t for p in probes for t in tensors_of(p)):
        if tensor not in values:
            raise ModelError(f"there is no tensor {tensor!r} in the main graph; list the tensors with: qcompile inspect")


def _reduced(made: Instrumented, value: ir.Value, reduction: Reduction, check: bool) -> Reduced:
    """The outputs of a reduction of a tensor, made once."""
    key, tag = (str(value.name), reduction), len(made.reductions)
    if key in made.reductions:
        return made.reductions[key]
    source = _wide(made.model, value, tag) if reduction.sums else value
    outputs = tuple(made.output(_apply(made.model, op, value, source, reduction, tag)) for op in reduction.operators)
    total = None
    if check:
        assert value.shape is not None
        everything = range(len(value.shape))
        total = made.output(graphs.reduce(made.model, "ReduceSum", value, everything, f"qcompile_check_{tag}"))
    made.reductions[key] = Reduced(outputs, total)
    return made.reductions[key]


def _apply(model: Model, op: str, value: ir.Value, source: ir.Value, reduction: Reduction, tag: int) -> ir.Value:
    name = f"qcompile_{op}_{tag}"
    if op == "Size":
        return graphs.append(model, op, [value], name, ir.DataType.INT64)
    return graphs.reduce(model, op, source, reduction.axes, name)


def _wide(model: Model, value: ir.Value, tag: int) -> ir.Value:
    """float16 as float32: the kernels' sums and scaled values would overflow."""
    if value.dtype != ir.DataType.FLOAT16:
        return value
    return graphs.cast(model, value, ir.DataType.FLOAT, f"qcompile_wide_{tag}")
