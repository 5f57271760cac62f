"""A user's function as a metric: it is called once for each model, with the outputs of all samples."""

from __future__ import annotations

import contextlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from qcompile.errors import DataError
from qcompile.execute.task.metric import Array, Batch
from qcompile.execute.task.score import F64, Means, Score

_FURTHER = ("rows", "inputs")
Outputs = dict[str, "Array | list[Array]"]


@dataclass
class Custom:
    """`function(outputs)`, `function(outputs, labels)`, either with `rows` or `inputs` by name (see docs/guide/accuracy.md).

    `where` says which function it is.  Returns a number, an array of one number a sample, or a mapping of names to these.
    """

    function: Callable[..., Any]
    where: str
    sides: tuple[list[Mapping[str, Array]], list[Mapping[str, Array]]] = field(default_factory=lambda: ([], []))
    labels: list[Array] = field(default_factory=list[Array])
    inputs: list[Mapping[str, Array]] = field(default_factory=list[Mapping[str, Array]])
    sizes: list[int] = field(default_factory=list[int])
    rows: list[int] = field(default_factory=list[int])

    @property
    def title(self) -> str:
        """The function."""
        return f"metric {self.where}"

    @property
    def name(self) -> str:
        """The function's own name, that of a figure without another."""
        return self.where.rpartition(":")[2]

    def add(self, batch: Batch) -> None:
        """Keep a batch: a function of the user's may need all samples at once."""
        for held, side in zip(self.sides, (batch.reference, batch.candidate), strict=True):
            held.append(side)
        self.labels += [] if batch.labels is None else [batch.labels]
        self.inputs.append(batch.inputs)
        self.sizes.append(len(batch.rows))
        self.rows += batch.rows

    def scores(self) -> tuple[Score, ...]:
        """What the function says of both models.

        Raises:
            DataError: it fails, or returns something else.
        """
        ours, theirs = (self._called(side, which) for side, which in zip(self.sides, ("reference", "candidate"), strict=True))
        if ours.keys() != theirs.keys():
            raise DataError(
                f"{self.title} returns {sorted(ours)} for the reference and {sorted(theirs)} for the candidate; name the same"
            )
        return tuple(self._score(name, ours[name], theirs[name]) for name in ours)

    def _score(self, name: str, ours: F64, theirs: F64) -> Score:
        n = len(self.rows)
        if not ours.ndim or not theirs.ndim:
            return Score(name, float(ours.mean()), float(theirs.mean()), n)
        means = Means()
        means.add(theirs, ours)
        return means.score(name, paired=True, share=bool(np.isin(np.stack([ours, theirs]), (0, 1)).all()))

    def _called(self, side: Sequence[Mapping[str, Array]], which: str) -> dict[str, F64]:
        labels = np.concatenate(self.labels) if self.labels else None
        further = {"rows": np.array(self.rows), "inputs": _joined(self.inputs, self.sizes)}
        given = self._wanted([_joined(side, self.sizes), labels], further)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                answer = self.function(*given[0], **given[1])
        except (Exception, SystemExit) as e:  # whatever the user's function raises
            raise DataError(f"{self.title} failed on the {which}'s outputs ({_told(e)}); correct the function") from e
        return self._numbers(answer)

    def _wanted(self, first: list[Any], further: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments that the function takes."""
        names = list(inspect.signature(self.function).parameters)
        plain = [n for n in names if n not in _FURTHER]
        if not 1 <= len(plain) <= len(first):
            raise DataError(
                f"{self.title} takes ({', '.join(names)}); write it as (outputs), (outputs, labels), and rows or inputs if needed"
            )
        return first[: len(plain)], {n: further[n] for n in names if n in _FURTHER}

    def _numbers(self, answer: Any) -> dict[str, F64]:
        named = cast("Mapping[Any, Any]", answer) if isinstance(answer, Mapping) else {self.name: answer}
        found = {str(name): self._number(value) for name, value in named.items()}
        if not found:
            raise DataError(f"{self.title} returns an empty mapping; return a number, or names and their numbers")
        return found

    def _number(self, value: Any) -> F64:
        try:
            array = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            array = np.zeros((0, 0))
        if array.shape not in ((), (len(self.rows),)):
            raise DataError(
                f"{self.title} returns {_kind(value)}; return a number,"
                f" one a sample [{len(self.rows)}], or a mapping of names to these"
            )
        return array


def _kind(value: Any) -> str:
    return f"an array of shape {list(np.shape(value))}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


def _joined(batches: Sequence[Mapping[str, Array]], sizes: Sequence[int]) -> Outputs:
    """Each array of all samples, or a list of one a sample where their shapes differ, one a run where runs are no samples."""
    return {name: _one([b[name] for b in batches], sizes) for name in (batches[0] if batches else {})}


def _one(arrays: list[Array], sizes: Sequence[int]) -> Array | list[Array]:
    if not all(a.ndim and len(a) == n for a, n in zip(arrays, sizes, strict=True)):
        return [a.copy() for a in arrays]
    if len({a.shape[1:] for a in arrays}) == 1:
        return np.concatenate(arrays)
    return [row.copy() for a in arrays for row in a]


def _told(error: BaseException) -> str:
    """The error, and the line of the user's file."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__)[1:]]
    return f"{type(error).__name__}: {error}" + (f", line {lines[0]}" if lines else "")
