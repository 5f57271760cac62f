"""`qcompile eval`: a candidate against its float reference on data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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
from qcompile.execute.metrics import ErrorTally, LabelTally, LogitTally
from qcompile.execute.opening import open_model
from qcompile.execute.session import MAPPED, Session, batch_length, make_session
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
    """One of the two models, and what its first output is worth against the labels.

    `metrics`: `top1, nll` (integer labels [...] for logits [..., C]) or `mse` (reals of the output's shape); else none.
    """

    path: Path
    size_mb: float
    metrics: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """`path, size_mb` and the metrics."""
        return {"path": str(self.path), "size_mb": self.size_mb, **self.metrics}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How far the candidate's outputs are from the reference's.

    `sqnr_db, cosine, relative_error`: of the worst float output, the first of `outputs`, which are all of them; None where none
    can be measured.  `agreement`, `kl` and the metrics of both sides: of the first float output that is the same in every run;
    None for one that is not [..., C].  `simulated`: ONNX Runtime refuses to fuse the candidate, or lacks its formats.
    `per_layer`: worst first, when asked for.
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
    per_layer: tuple[LayerError, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """`schema_version` and the fields; `simulated` stands in `candidate`, `per_layer` only when asked for."""
        shown = {k: v for k, v in vars(self).items() if k not in ("simulated", "per_layer")}
        layers = {} if self.per_layer is None else {"per_layer": [asdict(x) for x in self.per_layer]}
        candidate = {**self.candidate.to_json(), "simulated": self.simulated}
        return {
            "schema_version": SCHEMA_VERSION, **shown, "reference": self.reference.to_json(), "candidate": candidate,
            "outputs": [asdict(o) for o in self.outputs], **layers,
        }  # fmt: skip


@dataclass
class _Tallies:
    """What is summed up while the data runs: against each other, and each against the labels."""

    outputs: list[OutputTally]
    logits: LogitTally = field(default_factory=LogitTally)
    reference_task: LabelTally | ErrorTally | None = None
    candidate_task: LabelTally | ErrorTally | None = None
    has_classes: bool = False


def evaluate(
    reference: str | Path,
    candidate: str | Path,
    data: Dataset,
    *,
    per_layer: bool = False,
    threads: int | None = None,
    progress: Meter | None = None,
) -> Evaluation:
    """Compare `candidate` with `reference` on `data`.

    Both run on ONNX Runtime with full optimization, as deployed; a model that was made for an engine runs with its Q/DQ pairs as
    they stand; a candidate that ONNX Runtime refuses to fuse, or whose formats it lacks (FP4, MXFP8), is simulated (`simulated`).
    Metrics are of the first float output.

    Args:
        per_layer: also compare the intermediate tensors that both graphs name (Q/DQ fusion off, first 16 samples).
        threads: of ONNX Runtime.
        progress: called with (samples done, samples in all).

    Raises:
        ModelError: a model does not load, or the two do not have the same outputs.
        DataError: the data holds no samples, or labels that do not exist among the classes.
        InputError: ONNX Runtime fails on a batch.
    """
    if not len(data):
        raise DataError("there are no samples to evaluate on; give more data")
    models = Model.load(reference), Model.load(candidate)
    sessions, simulated = _sessions(models, Path(reference), Path(candidate), threads)
    tallies = _run(sessions, _Tallies(outputs=tallies_of(models[0])), data, _fixed(data, *models), progress)
    layers = layer_errors(*models, data, threads=threads, progress=progress) if per_layer else None
    return _summary((Path(reference), Path(candidate)), tallies, simulated, len(data), layers)


def _fixed(data: Dataset, reference: Model, candidate: Model) -> int | None:
    return data.run_size(reference.inputs()) or data.run_size(candidate.inputs())


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
    sessions: tuple[Session, Session], tallies: _Tallies, data: Dataset, fixed: int | None, progress: Meter | None
) -> _Tallies:
    _require_same_outputs(*sessions)
    labels, done = data.labels, 0
    for feeds in data.batches(fixed or DEFAULT_BATCH):
        held = batch_length(feeds)
        outputs = [run_padded(s, feeds, fixed, done) for s in sessions]
        _require_comparable(tallies.outputs, *outputs)
        _tally(tallies, outputs[0], outputs[1], None if labels is None else labels[done : done + held])
        done += held
        if progress is not None:
            progress(done, len(data))
    return tallies


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


def _tally(tallies: _Tallies, reference: list[Array], candidate: list[Array], labels: Array | None) -> None:
    for tally, a, b in zip(tallies.outputs, reference, candidate, strict=True):
        tally.add(a, b)
    first = next((i for i, t in enumerate(tallies.outputs) if not (t.apart or t.nature.random)), None)
    if first is None:
        return
    r, c = reference[first], candidate[first]
    if _are_logits(r):
        tallies.has_classes = True
        tallies.logits.add(r, c)
    if labels is not None:
        _tally_labels(tallies, r, c, labels)


def _tally_labels(tallies: _Tallies, r: Array, c: Array, labels: Array) -> None:
    """Add a batch to the task's metrics; labels that fit neither task are left alone."""
    kind = _task(r, labels)
    if kind is None:
        return
    if tallies.reference_task is None or tallies.candidate_task is None:
        tallies.reference_task, tallies.candidate_task = kind(), kind()
    tallies.reference_task.add(r, labels)
    tallies.candidate_task.add(c, labels)


def _task(output: Array, labels: Array) -> type[LabelTally] | type[ErrorTally] | None:
    if labels.dtype.kind in "iu" and labels.shape == output.shape[:-1] and output.ndim > 1:
        if labels.size and (labels.min() < 0 or labels.max() >= output.shape[-1]):
            span = f"{labels.min()}..{labels.max()}"
            raise DataError(f"the labels hold {span} and the output has {output.shape[-1]} classes; fix the labels")
        return LabelTally
    return ErrorTally if labels.dtype.kind == "f" and labels.shape == output.shape else None


def _are_logits(output: Array) -> bool:
    """[N, C] or [N, T, C]: pictures and other maps have no classes on their last axis."""
    return output.dtype.kind == "f" and output.ndim in (2, 3) and output.shape[-1] > 1


def _summary(
    paths: tuple[Path, Path], tallies: _Tallies, simulated: bool, samples: int, layers: tuple[LayerError, ...] | None
) -> Evaluation:
    listed = figures(tallies.outputs)
    worst = {t.name: t.distance for t in tallies.outputs}[listed[0].name] if worst_db(listed) is not None else None
    return Evaluation(
        reference=_side(paths[0], tallies.reference_task),
        candidate=_side(paths[1], tallies.candidate_task),
        simulated=simulated,
        samples=samples,
        sqnr_db=worst_db(listed),
        cosine=None if worst is None else worst.cosine,
        relative_error=None if worst is None else worst.relative_error,
        agreement=tallies.logits.agreement if tallies.has_classes else None,
        kl=tallies.logits.kl if tallies.has_classes else None,
        outputs=listed,
        per_layer=layers,
    )


def _side(path: Path, task: LabelTally | ErrorTally | None) -> Side:
    return Side(path, round(file_bytes(path) / 1e6, 3), _metrics(task))


def _metrics(task: LabelTally | ErrorTally | None) -> dict[str, float]:
    if isinstance(task, LabelTally):
        return {"top1": task.top1, "nll": task.nll}
    return {} if task is None else {"mse": task.mse}
