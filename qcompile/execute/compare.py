"""Whether two models compute the same: their outputs on a few samples, on ONNX Runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.errors import InputError
from qcompile.execute.emulate.runnable import runnable
from qcompile.execute.figures import OutputTally, figures, tallies, worst_db
from qcompile.execute.metrics import Distance
from qcompile.execute.opening import open_model, run_in_parts
from qcompile.execute.parts import PartTally
from qcompile.execute.session import SAMPLES, batch_length, run
from qcompile.ir.cut import BLOCK_NODES
from qcompile.ir.mapped import let_go
from qcompile.ir.model import Model
from qcompile.ir.ops import int_attr, is_op
from qcompile.ir.spill import is_large
from qcompile.ir.widen import computed
from qcompile.report import Comparison

PART_BYTES = 1 << 26
ROUNDINGS = 4  # of the steps that an output of a 16-bit model may be off for no other reason than rounding
_STEPS = {ir.DataType.FLOAT16: 2.0**-10, ir.DataType.BFLOAT16: 2.0**-7}


@dataclass(frozen=True)
class Answers:
    """All outputs of a model for every feed, and what is known of them."""

    runs: list[list[NDArray[Any]]]
    tallies: list[OutputTally]


@dataclass
class OrtComparator:
    """Runs models on a few samples plus one random one, optimizations off, Q/DQ simulated exactly."""

    feeds: list[dict[str, NDArray[Any]]]
    threads: int | None = None
    proven: bool = False
    """Whether a model ran on all feeds."""

    @property
    def samples(self) -> int:
        """How many samples figures in dB are measured on."""
        return sum(batch_length(feed) for feed in self.feeds[:-1])

    def outputs(self, model: Model) -> Answers:
        """All outputs for every feed, in float32 where the model computes in it and gives back another type.

        Indices, counts and lengths may travel as floats: where the first model does not run with a random sample, a real one
        stands in for it.
        """
        try:
            answers = self._outputs(model)
        except InputError:
            if self.proven or len(self.feeds) < 2:
                raise
            self.feeds[-1] = self.feeds[0]
            answers = self._outputs(model)
        self.proven = True
        return answers

    def _outputs(self, model: Model) -> Answers:
        if runs_in_parts(model):
            runs = run_in_parts(runnable(computed(model)), self.feeds, PART_BYTES, threads=self.threads)
            return Answers(runs, tallies(model))
        return self._run(model, exact=True)

    def compare(self, reference: Answers, candidate: Answers) -> Comparison:
        """How far apart the outputs are, each by what the reference is known to do; dB without the random sample."""
        pairs = list(zip(reference.runs, candidate.runs, strict=True))
        found = [replace(t, distance=Distance(), parts=PartTally(t.parts.join)) for t in reference.tallies]
        for expected, got in pairs[:-1] or pairs:  # the random sample comes last
            for tally, a, b in zip(found, expected, got, strict=True):
                tally.add(a, b)
        errors = {t.name: max(_relative(e[i], g[i]) for e, g in pairs) for i, t in enumerate(found) if t.nature.smooth}
        listed = figures(found)
        return Comparison(max(errors.values(), default=None), worst_db(listed), len(pairs), errors, listed)

    def noise(self, model: Model, answers: Answers) -> dict[str, float]:
        """How far each output of `model`, which has given `answers`, moves by rounding alone, relative to its size.

        Measured with the optimizations that ONNX Runtime makes, which change the order of the arithmetic; at least
        a few steps of the coarsest type that the model computes in.  A large model is not run again.
        """
        steps = ROUNDINGS * coarsest_step(model.graph)
        moved = {} if runs_in_parts(model) else self._moved(model, answers)
        return {t.name: max(steps, moved.get(t.name, 0.0)) for t in answers.tallies}

    def _moved(self, model: Model, answers: Answers) -> dict[str, float]:
        with contextlib.suppress(InputError):  # its optimizer may fail where the model as written runs
            found = self.compare(answers, self._run(model, exact=False)).errors
            return {name: error for name, error in found.items() if np.isfinite(error)}
        return {}

    def _run(self, model: Model, *, exact: bool) -> Answers:
        session = open_model(computed(model), exact=exact, threads=self.threads)
        found = [run(session, {k: v for k, v in feed.items() if k != SAMPLES}, None, i) for i, feed in enumerate(self.feeds)]
        let_go(model.ir)
        return Answers(found, tallies(model))


def runs_in_parts(model: Model) -> bool:
    """Whether a session of the whole model would take too much memory or, opened, time that is not linear in its nodes."""
    return is_large(model.graph) or len(model.graph) > 2 * BLOCK_NODES


def coarsest_step(graph: ir.Graph) -> float:
    """The distance of 1 from the next number in the coarsest 16-bit type in `graph`; 0 where all floats have more bits."""
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values(), *(v for n in graph.all_nodes() for v in n.outputs)]
    types = {v.dtype for v in values} | {ir.DataType(int_attr(n, "to", 1)) for n in graph.all_nodes() if is_op(n, "Cast")}
    return max((step for dtype, step in _STEPS.items() if dtype in types), default=0.0)


def _relative(a: NDArray[Any], b: NDArray[Any]) -> float:
    if a.shape != b.shape:
        return float("inf")
    if a.dtype.kind not in "fV" or a.size == 0:
        return 0.0 if np.array_equal(a, b) else 1.0
    wide, other = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
    odd = ~np.isfinite(wide)
    if not np.array_equal(wide[odd], other[odd], equal_nan=True):
        return float("inf")
    top = float(np.abs(wide[~odd]).max(initial=0.0))
    return float(np.abs(wide[~odd] - other[~odd]).max(initial=0.0)) / (top or 1.0)


def comparator(samples: Sequence[dict[str, NDArray[Any]]], seed: int, threads: int | None = None) -> OrtComparator:
    """On `samples`, and one random sample of the first one's shapes and value ranges."""
    return OrtComparator([*samples, _random_like(samples[0], seed)], threads)


def _random_like(feed: dict[str, NDArray[Any]], seed: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {name: _random(rng, array) for name, array in feed.items()}


def _random(rng: np.random.Generator, array: NDArray[Any]) -> NDArray[Any]:
    """Floats uniform over the array's range; integers, bools and masks with infinities drawn from its own values."""
    if array.dtype.kind == "f" and array.size and np.isfinite(array).all():
        return rng.uniform(float(array.min()), float(array.max()), array.shape).astype(array.dtype)
    return rng.permutation(array.reshape(-1)).reshape(array.shape)
