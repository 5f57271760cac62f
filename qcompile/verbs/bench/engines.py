"""`qcompile bench` with engines: latencies on this machine's GPU, and outputs compared with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.backend.manifest import is_engine
from qcompile.backend.runner import Arrays, EngineRuns, run_engines
from qcompile.errors import InputError, UsageError
from qcompile.execute.emulate.runnable import runnable
from qcompile.execute.feeds import cast_feeds
from qcompile.execute.metrics import Distance
from qcompile.execute.opening import open_model
from qcompile.execute.session import make_session, run
from qcompile.execute.timing import Ratio, Timing, ratios, timing
from qcompile.ir.model import Model
from qcompile.report import SCHEMA_VERSION

__all__ = ["bench_engines", "is_engine"]


@dataclass(frozen=True)
class OutputDistance:
    """How far an engine's outputs are from the reference's."""

    sqnr_db: float
    cosine: float
    relative_error: float


@dataclass(frozen=True)
class Compared:
    """An engine's outputs beside those of the reference on ONNX Runtime."""

    path: str
    reference: str
    distance: OutputDistance

    def to_json(self) -> dict[str, Any]:
        """The keys path, reference, sqnr_db, cosine, relative_error."""
        return {"path": self.path, "reference": self.reference, **vars(self.distance)}


@dataclass(frozen=True)
class BenchedEngines:
    """Latencies of engines on the GPU, ratios to the first one, and distances from the reference, if there is one."""

    gpu: str
    backend: str
    runs: int
    models: tuple[Timing, ...]
    ratios: tuple[Ratio, ...]
    compared: tuple[Compared, ...]

    def to_json(self) -> dict[str, Any]:
        """`schema_version, gpu, backend, runs, models, ratios, compared`."""
        lists = {name: [x.to_json() for x in getattr(self, name)] for name in ("models", "ratios", "compared")}
        return {"schema_version": SCHEMA_VERSION, "gpu": self.gpu, "backend": self.backend, "runs": self.runs, **lists}


def bench_engines(paths: Sequence[Path], *, runs: int, seed: int = 0) -> BenchedEngines:
    """Time engines against the first one, on the same made-up inputs at the optimum shapes.

    ONNX models among `paths` are run once with ONNX Runtime; each engine's outputs are compared with the first of
    them (its Q/DQ pairs are simulated one by one, as TensorRT computes them).

    Raises:
        ModelError, BackendError: see `run_engines`.
        UsageError: no engine, or more than one reference.
    """
    engines, references = [p for p in paths if is_engine(p)], [p for p in paths if not is_engine(p)]
    if not engines or len(references) > 1:
        raise UsageError("bench with engines takes one engine or more, and at most one ONNX model to compare them with")
    ran = run_engines(engines, runs=runs, seed=seed)
    models = tuple(timing(p, t) for p, t in zip(engines, ran.milliseconds, strict=True))
    compared = tuple(c for reference in references for c in _compared(engines, ran, reference))
    return BenchedEngines(ran.gpu, ran.backend, runs, models, ratios(models), compared)


def _compared(engines: Sequence[Path], ran: EngineRuns, reference: Path) -> list[Compared]:
    model = Model.load(reference)
    session = make_session(reference, qdq_fusion=False) if runnable(model) is model else open_model(model)
    names = [o.name for o in session.get_outputs()]
    wanted = dict(zip(names, run(session, cast_feeds(session, ran.feeds)), strict=True))
    found = zip(engines, ran.outputs, strict=True)
    return [Compared(str(p), str(reference), distance(wanted, made)) for p, made in found]


def distance(reference: Arrays, made: Arrays) -> OutputDistance:
    """Over the outputs that both have.

    Raises:
        InputError: no output in common, or different shapes.
    """
    common = [n for n in reference if n in made]
    if not common:
        raise InputError(
            f"the engine has the outputs {', '.join(made)}, the reference {', '.join(reference)}; compare with the model that it"
            " was built from"
        )
    total = Distance()
    for name in common:
        if reference[name].shape != made[name].shape:
            raise InputError(
                f"output {name!r} is {made[name].shape} of the engine and {reference[name].shape} of the reference; compare with"
                " the model that it was built from"
            )
        total.add(reference[name], made[name])
    return OutputDistance(total.sqnr_db, total.cosine, total.relative_error)
