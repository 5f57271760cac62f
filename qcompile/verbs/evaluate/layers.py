"""Which layer hurts: the intermediate tensors of two graphs, compared by name."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from qcompile.calib.data.dataset import Dataset
from qcompile.errors import ModelError
from qcompile.execute.feeds import run_padded
from qcompile.execute.metrics import ChannelTally, Distance
from qcompile.execute.opening import open_model
from qcompile.execute.session import Session, batch_length
from qcompile.ir.model import Model
from qcompile.ir.ops import is_data_movement
from qcompile.report import Meter

SAMPLES = 16
RESCALED_GAIN_DB = 10.0
RESCALED_SLOPE = 0.02
GONE_DB = 10.0
_NOT_LAYERS = {"QuantizeLinear", "DequantizeLinear", "Constant", "Shape"}
_FLOATS = {"tensor(float)", "tensor(float16)", "tensor(double)"}


@dataclass(frozen=True)
class LayerError:
    """The error of tensor `value`, which `node` makes.

    `input_sqnr_db`: the worst SQNR among the node's own compared inputs (None when none is): a node far below it is where
    the error enters.  `rescaled`: a fold's per-channel affine map was undone first.
    """

    node: str
    op_type: str
    value: str
    sqnr_db: float
    input_sqnr_db: float | None
    relative_error: float
    rescaled: bool


@dataclass
class _Layer:
    """A tensor that both graphs make under one name."""

    node: ir.Node
    value: str
    distance: Distance = field(default_factory=Distance)
    channels: ChannelTally = field(default_factory=ChannelTally)

    @property
    def sqnr_db(self) -> tuple[float, bool]:
        """SQNR in dB, and whether a per-channel affine map was undone first.

        Passes that fold scales into a norm leave its output under its name with other values: a far better fit after
        per-channel scaling, with slopes that are not 1, says so.  A shift of means alone is an error, not a fold.
        """
        plain = self.distance.sqnr_db
        fitted, slope = self.channels.fit()
        if slope > RESCALED_SLOPE and fitted - plain >= RESCALED_GAIN_DB:
            return fitted, True
        return plain, False


def layer_errors(
    reference: Model,
    candidate: Model,
    data: Dataset,
    *,
    threads: int | None = None,
    progress: Meter | None = None,
) -> tuple[LayerError, ...]:
    """The error of every float tensor that nodes of both main graphs make under the same name, worst first.

    A tensor whose error is gone behind all of its readers (10 dB or more) is left out: it is another quantity under an old name
    (a convolution without the bias that stands behind it now, a norm whose shift was folded), or its error costs nothing.
    Sessions run unfused (no Q/DQ fusion), one sample a run, at most 16 samples.

    Raises:
        ModelError: the graphs share no tensor, or a graph does not load.
    """
    layers = _common(reference, candidate)
    if not layers:
        raise ModelError("the two graphs share no tensor names; compare a model with one that was made from it")
    chosen = data if len(data) <= SAMPLES else data.take(SAMPLES)
    _run(layers, reference, candidate, chosen, threads, progress)
    return _rows({n: layer for n, layer in layers.items() if layer.distance.largest or layer.distance.largest_error})


def _common(reference: Model, candidate: Model) -> dict[str, _Layer]:
    theirs = {v.name for n in candidate.graph if n.op_type not in _NOT_LAYERS for v in n.outputs}
    return {
        str(v.name): _Layer(node, str(v.name))
        for node in reference.graph
        if node.op_type not in _NOT_LAYERS and not is_data_movement(node)
        for v in node.outputs
        if v.name and v.name in theirs
    }


def _run(
    layers: dict[str, _Layer],
    reference: Model,
    candidate: Model,
    data: Dataset,
    threads: int | None,
    progress: Meter | None,
) -> None:
    fixed = data.run_size(reference.inputs()) or data.run_size(candidate.inputs())
    sessions = [_exposed(m, layers, threads) for m in (reference, candidate)]
    names = _float_outputs(sessions, layers)
    done = 0
    for feeds in data.batches(fixed or 1):
        outputs = [run_padded(s, feeds, fixed, done, names) for s in sessions]
        for name, r, c in zip(names, *outputs, strict=True):
            if r.shape == c.shape:
                layers[name].distance.add(r, c)
                layers[name].channels.add(r, c)
        done += batch_length(feeds)
        if progress is not None:
            progress(done, len(data))


def _exposed(model: Model, layers: dict[str, _Layer], threads: int | None) -> Session:
    copy = model.clone()
    present = {v.name for v in copy.graph.outputs}
    copy.graph.outputs.extend(v for n in copy.graph for v in n.outputs if v.name in layers and v.name not in present)
    return open_model(copy, threads=threads)


def _float_outputs(sessions: list[Session], layers: dict[str, _Layer]) -> list[str]:
    floats = [{o.name for o in s.get_outputs() if o.type in _FLOATS} for s in sessions]
    return [name for name in layers if all(name in f for f in floats)]


def _rows(layers: dict[str, _Layer]) -> tuple[LayerError, ...]:
    found = {name: layer.sqnr_db for name, layer in layers.items()}
    found = {name: answer for name, answer in found.items() if not _gone(layers[name].node, name, answer[0], found)}
    layers = {name: layers[name] for name in found}
    rows = [_row(layer, *found[name], found) for name, layer in layers.items()]
    return tuple(sorted(rows, key=lambda row: (row.sqnr_db, row.node)))


def _gone(node: ir.Node, name: str, sqnr: float, found: dict[str, tuple[float, bool]]) -> bool:
    """Whether the error of a tensor is not seen behind any node that reads it."""
    read = [v for v in node.outputs if v.name == name for v in _behind(v, found)]
    return bool(read) and all(found[str(v.name)][0] >= sqnr + GONE_DB for v in read)


def _behind(value: ir.Value, found: dict[str, tuple[float, bool]]) -> list[ir.Value]:
    """The compared tensors that the readers of `value` make, through data movement; none where one is not known."""
    made = list[ir.Value]()
    for reader in value.consumers():
        for v in reader.outputs:
            further = [v] if str(v.name) in found else _behind(v, found) if is_data_movement(reader) else []
            if not further:
                return []
            made += further
    return [] if value.is_graph_output() else made


def _row(layer: _Layer, sqnr: float, rescaled: bool, found: dict[str, tuple[float, bool]]) -> LayerError:
    node, error = layer.node, layer.distance.relative_error
    worst = min((found[name][0] for v in node.inputs for name in _sources(v, found)), default=None)
    return LayerError(str(node.name), node.op_type, layer.value, sqnr, worst, error, rescaled)


def _sources(value: ir.Value | None, found: dict[str, tuple[float, bool]]) -> set[str]:
    """The compared tensors that `value` is made of, through data movement (which is not compared itself)."""
    if value is None or str(value.name) in found:
        return set() if value is None else {str(value.name)}
    producer = value.producer()
    if producer is None or not is_data_movement(producer):
        return set()
    return set[str]().union(*(_sources(v, found) for v in producer.inputs))
