"""Which task a model is measured by: what was asked for, else what the labels and the outputs look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qcompile.errors import DataError, UsageError, near
from qcompile.execute.figures import OutputTally
from qcompile.execute.task.binary import Binary
from qcompile.execute.task.classification import Classification
from qcompile.execute.task.detection import Detection, fresh
from qcompile.execute.task.embeddings import Embeddings, Pairs
from qcompile.execute.task.metric import Array, Batch, Metric
from qcompile.execute.task.regression import Regression

Task = Literal["auto", "classification", "embeddings", "detection", "regression", "none"]
_VECTORS = ("embed", "hidden", "feature", "pooler", "pooled")
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Asked:
    """The task, the output that it is measured on, and the pairs of the data."""

    task: Task = "auto"
    on: str | None = None
    pairs: Pairs | None = None


@dataclass(frozen=True)
class Chosen:
    """The metric of the task (None where nothing can be measured), why it is this one, and what is to be warned of."""

    metric: Metric | None
    output: str | None
    why: str
    warning: str = ""


def choose(asked: Asked, outputs: Sequence[OutputTally], first: Batch) -> Chosen:
    """The metric, by the first batch of the reference; `outputs` are the reference's, whose natures and joins are known.

    Raises:
        UsageError: no output of the name.
        DataError: the labels do not fit the task that was asked for.
    """
    names = _eligible(asked.on, outputs, first)
    if asked.task == "none" or not names:
        return Chosen(None, names[0] if names else None, "")
    if asked.task != "auto":
        return _told(asked, names, outputs, first)
    if asked.pairs is not None:
        name = next((n for n in names if np.ndim(first.reference[n]) == 2), names[0])
        return Chosen(Embeddings(name, asked.pairs), name, "the data holds pairs and their scores")
    return _by_labels(names, first) or _by_outputs(asked, names, outputs, first)


def _eligible(on: str | None, outputs: Sequence[OutputTally], first: Batch) -> list[str]:
    """Float outputs that are the same in every run, in order, or the one that was asked for."""
    known = [t.name for t in outputs]
    if on is not None and on not in known:
        raise UsageError(f"--on {on!r} is no output of the model{near(on, known)} (outputs: {', '.join(known)})")
    smooth = [t.name for t in outputs if not t.nature.made and not t.nature.random and _is_float(first, t.name)]
    return [on] if on is not None else smooth


def _is_float(first: Batch, name: str) -> bool:
    return first.reference[name].dtype.kind in "fV" and first.reference[name].shape == first.candidate[name].shape


def _told(asked: Asked, names: Sequence[str], outputs: Sequence[OutputTally], first: Batch) -> Chosen:
    if asked.task == "detection":
        return Chosen(_detection(asked, outputs), asked.on, "asked for")
    if asked.task == "embeddings":
        name = next((n for n in names if any(w in n.lower() for w in _VECTORS)), names[0])
        return Chosen(Embeddings(name, asked.pairs), name, "asked for")
    if first.labels is None:
        kind = Classification if asked.task == "classification" else Regression
        return Chosen(kind(names[0]), names[0], "asked for")
    fit = _classes if asked.task == "classification" else _targets
    found = next((m for n in names if (m := fit(n, first.reference[n], first.labels))), None)
    if found is None:
        raise DataError(f"{_unfit(names, first)} as {asked.task} asks; correct them, or name the output (--on) or another --task")
    return Chosen(found, found.output, "asked for")


def _by_labels(names: Sequence[str], first: Batch) -> Chosen | None:
    if first.labels is None:
        return None
    fits = (_classes, _targets) if first.labels.dtype.kind in "iub" else (_targets,)
    for fit in fits:
        for name in names:
            if (metric := fit(name, first.reference[name], first.labels)) is not None:
                return Chosen(metric, name, f"the labels fit output {name!r}")
    return None


def _by_outputs(asked: Asked, names: Sequence[str], outputs: Sequence[OutputTally], first: Batch) -> Chosen:
    warning = f"{_unfit(names, first)}, and are not used; name the task (--task)" if first.labels is not None else ""
    shown = [t for t in outputs if t.name in names]
    if any(t.parts.join for t in shown) or (len(outputs) > len(names) and len(names) > 1):
        return Chosen(_detection(asked, outputs), asked.on, "outputs of unlike quantities", warning)
    name, array = names[0], first.reference[names[0]]
    if any(word in name.lower() for word in _VECTORS) or _unit(array):
        return Chosen(Embeddings(name), name, "the name, or vectors of length 1", warning)
    if array.ndim in (2, 3) and array.shape[-1] > 1:
        return Chosen(Classification(name), name, "an output of rows, without labels", warning)
    return Chosen(Regression(name), name, "an output of real numbers", warning)


def _detection(asked: Asked, outputs: Sequence[OutputTally]) -> Detection:
    return Detection(fresh([t for t in outputs if asked.on in (None, t.name)]))


def _classes(name: str, output: Array, labels: Array) -> Classification | Binary | None:
    """Labels of classes on the last or on the second axis, axes of size 1 aside; or of two classes."""
    if labels.dtype.kind in "iub":
        for axis in (-1, 1):
            rest = list(output.shape)
            if output.ndim > 1 and rest.pop(axis) > 1 and _bare(rest) == _bare(labels.shape):
                return Classification(name, axis)
    two = labels.size == output.size and bool(np.isin(labels, (0, 1)).all())
    return Binary(name) if two else None


def _targets(name: str, output: Array, labels: Array) -> Regression | None:
    return Regression(name) if labels.dtype.kind in "fiu" and _bare(labels.shape) == _bare(output.shape) else None


def _bare(shape: Sequence[int]) -> tuple[int, ...]:
    """Without axes of size 1 behind the first."""
    return (*shape[:1], *(int(d) for d in shape[1:] if d != 1))


def _unit(array: Array) -> bool:
    """Whether the rows are vectors of length 1 (and no probabilities)."""
    if array.ndim != 2 or array.shape[-1] < 2:
        return False
    rows = array.astype(np.float64)
    alone = rows.min() >= 0 and np.allclose(rows.sum(-1), 1.0, atol=_TOLERANCE)
    return not alone and bool(np.allclose(np.square(rows).sum(-1), 1.0, atol=_TOLERANCE))


def _unfit(names: Sequence[str], first: Batch) -> str:
    shapes = ", ".join(f"{n} {list(first.reference[n].shape)}" for n in names)
    labels = first.labels
    kind = "none" if labels is None else f"{labels.dtype} {list(labels.shape)}"
    return f"the labels (a batch is {kind}) fit no output ({shapes})"
