"""`qcompile eval`: a candidate against its float reference on data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.data.dataset import Dataset
from qcompile.errors import DataError, ModelError
from qcompile.execute.emulate.runnable import runnable
from qcompile.execute.feeds import run_padded
from qcompile.execute.figures import OutputTally, figures, worst_db
from qcompile.execute.figures import tallies as tallies_of
from qcompile.execute.metrics import LogitTally
from qcompile.execute.opening import open_model
from qcompile.execute.session import MAPPED, SAMPLES, Session, batch_length, make_session
from qcompile.execute.task.choice import Asked, Chosen, choose
from qcompile.execute.task.metric import Batch, Metric
from qcompile.execute.task.score import Score
from qcompile.ir.model import Model
from qcompile.ir.reader import file_bytes
from qcompile.ir.spill import is_large
from qcompile.report import SCHEMA_VERSION, Meter, OutputFigure
from qcompile.target.catalog import engine_targets
from qcompile.verbs.evaluate.layers import LayerError, layer_errors

Array = NDArray[Any]
DEFAULT_BATCH = 16


@dataclass(frozen=True)
class Side:
    """One of the two models, and its own figures of the tasks (see `Measure`): none without labels, pairs or a metric."""

    path: Path
    size_mb: float
    metrics: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """`path, size_mb` and the metrics."""
        return {"path": str(self.path), "size_mb": self.size_mb, **self.metrics}


@dataclass(frozen=True)
class Measure:
    """What a metric says of both models, and why it was measured."""

    title: str
    why: str
    scores: tuple[Score, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return {"title": self.title, "why": self.why, "scores": [s.to_json() for s in self.scores]}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How far the candidate's outputs are from the reference's.

    `sqnr_db, cosine, relative_error`: of the worst float output, the first of `outputs`, which are all of them; None where none
    can be measured.  `agreement`, `kl`: of the output that the task is measured on; None for one that is not [..., C].
    `tasks`: the task's measure and those of the user.  `warnings`: what became of labels that fit nothing.
    `simulated`: ONNX Runtime refuses to fuse the candidate, or lacks its formats.  `per_layer`: worst first, when asked for.
    """

    reference: Side
    candidate: Side
    simulated: bool
    samples: int
    sqnr_db: float | None
    cosine: float | None
    relative_error: float | None
    agreement: float | None
    kl: float | None
    outputs: tuple[OutputFigure, ...]
    tasks: tuple[Measure, ...] = ()
    warnings: tuple[str, ...] = ()
    per_layer: tuple[LayerError, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """`schema_version` and the fields; `simulated` stands in `candidate`, `per_layer` only when asked for."""
        shown = {k: v for k, v in vars(self).items() if k not in ("simulated", "per_layer", "warnings")}
        layers = {} if self.per_layer is None else {"per_layer": [asdict(x) for x in self.per_layer]}
        candidate = {**self.candidate.to_json(), "simulated": self.simulated}
        return {
            "schema_version": SCHEMA_VERSION, **shown, "reference": self.reference.to_json(), "candidate": candidate,
            "outputs": [asdict(o) for o in self.outputs], "tasks": [t.to_json() for t in self.tasks], **layers,
        }  # fmt: skip


@dataclass
class _Tallies:
    """What is summed up while the data runs: against each other, by the task, and by the user's metrics."""

    outputs: list[OutputTally]
    metrics: Sequence[Metric] = ()
    chosen: Chosen | None = None
    logits: LogitTally = field(default_factory=LogitTally)
    has_classes: bool = False

    @property
    def measured(self) -> list[Metric]:
        """The task's metric first."""
        first = None if self.chosen is None else self.chosen.metric
        return [*([] if first is None else [first]), *self.metrics]


def evaluate(
    reference: str | Path,
    candidate: str | Path,
    data: Dataset,
    *,
    asked: Asked | None = None,
    metrics: Sequence[Metric] = (),
    per_layer: bool = False,
    threads: int | None = None,
    progress: Meter | None = None,
) -> Evaluation:
    """Compare `candidate` with `reference` on `data`.

    Both run on ONNX Runtime with full optimization, as deployed; a model that was made for an engine runs with its Q/DQ pairs as
    they stand; a candidate that ONNX Runtime refuses to fuse, or whose formats it lacks (FP4, MXFP8), is simulated (`simulated`).

    Args:
        asked: the task and its output; default: by the labels and the outputs (`qcompile.execute.task.choice`).
        metrics: fresh ones that are measured too.
        per_layer: also compare the intermediate tensors that both graphs name (Q/DQ fusion off, first 16 samples).
        threads: of ONNX Runtime.
        progress: called with (samples done, samples in all).

    Raises:
        ModelError: a model does not load, or the two do not have the same outputs.
        DataError: the data holds no samples, labels that fit nothing that was asked for, or a metric fails.
        UsageError: no output of the name.
        InputError: ONNX Runtime fails on a batch.
    """
    if not len(data):
        raise DataError("there are no samples to evaluate on; give more data")
    models = Model.load(reference), Model.load(candidate)
    sessions, simulated = _sessions(models, Path(reference), Path(candidate), threads)
    tallies = _Tallies(tallies_of(models[0]), metrics)
    _run(sessions, tallies, data, _run_size(data, models, bool(metrics)), asked or Asked(pairs=data.pairs), progress)
    layers = layer_errors(*models, data, threads=threads, progress=progress) if per_layer else None
    return _summary((Path(reference), Path(candidate)), tallies, simulated, len(data), layers)


@dataclass(frozen=True)
class _Size:
    """Samples a run: `fixed` is what the models take (None: as many as one likes), `batch` what they are given."""

    fixed: int | None
    batch: int


def _run_size(data: Dataset, models: tuple[Model, Model], whole: bool) -> _Size:
    """`whole`: somebody looks at the outputs sample by sample; where a first axis is not the samples, one sample a run."""
    fixed = data.run_size(models[0].inputs()) or data.run_size(models[1].inputs())
    own = {str(i.shape[0]) for i in models[0].inputs() if i.shape}
    odd = any(v.shape is not None and (not len(v.shape) or str(v.shape[0]) not in own) for v in models[0].graph.outputs)
    return _Size(fixed, fixed or (1 if whole and odd else DEFAULT_BATCH))


def _sessions(
    models: tuple[Model, Model], reference: Path, candidate: Path, threads: int | None
) -> tuple[tuple[Session, Session], bool]:
    """Both sessions, and whether the candidate's Q/DQ pairs are simulated because ONNX Runtime fails to run or to fuse them."""
    first, _ = _session(models[0], reference, threads)
    second, simulated = _session(models[1], candidate, threads)
    return (first, second), simulated


def _session(model: Model, path: Path, threads: int | None) -> tuple[Session, bool]:
    """A session, and whether it simulates."""
    ready = runnable(model)
    if ready is not model:
        return open_model(ready, threads=threads), True
    if model.metadata.get("qcompile.target") in engine_targets():
        return open_model(model, threads=threads), False
    try:
        return make_session(path, threads=threads, **(MAPPED if is_large(model.graph) else {})), False
    except ModelError:
        return open_model(model, threads=threads), True


def _run(
    sessions: tuple[Session, Session], tallies: _Tallies, data: Dataset, size: _Size, asked: Asked, progress: Meter | None
) -> None:
    _require_same_outputs(*sessions)
    names, labels, done = [t.name for t in tallies.outputs], data.labels, 0
    for feeds in data.batches(size.batch):
        held = batch_length(feeds)
        outputs = [run_padded(s, feeds, size.fixed, done) for s in sessions]
        _require_comparable(tallies.outputs, *outputs)
        sides = [dict(zip(names, o, strict=True)) for o in outputs]
        inputs = {k: v for k, v in feeds.items() if k != SAMPLES}
        some = None if labels is None else labels[done : done + held]
        _tally(tallies, Batch(sides[0], sides[1], data.index[done : done + held], some, inputs), asked)
        done += held
        if progress is not None:
            progress(done, len(data))


def _require_same_outputs(reference: Session, candidate: Session) -> None:
    names = [o.name for o in reference.get_outputs()]
    others = [o.name for o in candidate.get_outputs()]
    if len(names) != len(others):
        raise ModelError(
            f"the reference has the outputs {names} and the candidate {others}; compare a model with one that was made from it"
        )


def _require_comparable(outputs: list[OutputTally], reference: list[Array], candidate: list[Array]) -> None:
    for tally, r, c in zip(outputs, reference, candidate, strict=True):
        name = tally.name
        if r.shape != c.shape and tally.nature.smooth:
            raise ModelError(
                f"output {name!r} is {r.shape} in the reference and {c.shape} in the candidate; give two forms of one model"
            )
        for which, array in (("reference", r), ("candidate", c)):
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ModelError(
                    f"output {name!r} of the {which} holds NaN or infinity; keep the layer at fault in float (--keep-float)"
                )


def _tally(tallies: _Tallies, batch: Batch, asked: Asked) -> None:
    for tally in tallies.outputs:
        tally.add(batch.reference[tally.name], batch.candidate[tally.name])
    if tallies.chosen is None:
        tallies.chosen = choose(asked, tallies.outputs, batch)
    for metric in tallies.measured:
        unfit = metric is tallies.chosen.metric and tallies.chosen.warning
        metric.add(replace(batch, labels=None) if unfit else batch)
    if (name := tallies.chosen.output) is not None and _are_logits(batch.reference[name]):
        tallies.has_classes = True
        tallies.logits.add(batch.reference[name], batch.candidate[name])


def _are_logits(output: Array) -> bool:
    """[N, C] or [N, T, C]: pictures and other maps have no classes on their last axis."""
    return output.dtype.kind == "f" and output.ndim in (2, 3) and output.shape[-1] > 1


def _summary(
    paths: tuple[Path, Path], tallies: _Tallies, simulated: bool, samples: int, layers: tuple[LayerError, ...] | None
) -> Evaluation:
    listed = figures(tallies.outputs)
    worst = {t.name: t.distance for t in tallies.outputs}[listed[0].name] if worst_db(listed) is not None else None
    tasks = _measures(tallies)
    return Evaluation(
        reference=_side(paths[0], {s.name: s.reference for m in tasks for s in m.scores if s.reference is not None}),
        candidate=_side(paths[1], {s.name: s.candidate for m in tasks for s in m.scores if s.reference is not None}),
        simulated=simulated,
        samples=samples,
        sqnr_db=worst_db(listed),
        cosine=None if worst is None else worst.cosine,
        relative_error=None if worst is None else worst.relative_error,
        agreement=tallies.logits.agreement if tallies.has_classes else None,
        kl=tallies.logits.kl if tallies.has_classes else None,
        outputs=listed,
        tasks=tasks,
        warnings=(tallies.chosen.warning,) if tallies.chosen is not None and tallies.chosen.warning else (),
        per_layer=layers,
    )


def _measures(tallies: _Tallies) -> tuple[Measure, ...]:
    task = None if tallies.chosen is None else tallies.chosen.metric
    return tuple(
        Measure(m.title, tallies.chosen.why if m is task and tallies.chosen is not None else "asked for", m.scores())
        for m in tallies.measured
    )


def _side(path: Path, metrics: Mapping[str, float]) -> Side:
    return Side(path, round(file_bytes(path) / 1e6, 3), metrics)
