"""`qcompile bench` with engines: latencies on this machine's GPU, and outputs compared with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
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
from qcompile.execute.timing import ratios, timing
from qcompile.ir.model import Model
from qcompile.report import SCHEMA_VERSION

__all__ = ["bench_engines", "is_engine"]


def bench_engines(paths: Sequence[Path], *, runs: int, seed: int = 0) -> dict[str, Any]:
    """Time engines against the first one, on the same made-up inputs at the optimum shapes.

    ONNX models among `paths` are run once with ONNX Runtime; each engine's outputs are compared with the first of
    them (its Q/DQ pairs are simulated one by one, as TensorRT computes them).

    Returns:
        `schema_version, gpu, backend, runs, models` (`path, median_ms, min_ms`), `ratios` (`path, median, min`) and
        `compared` (`path, reference, sqnr_db, cosine, relative_error`).

    Raises:
        ModelError, BackendError: see `run_engines`.
        UsageError: no engine, or more than one reference.
    """
    engines, references = [p for p in paths if is_engine(p)], [p for p in paths if not is_engine(p)]
    if not engines or len(references) > 1:
        raise UsageError("bench with engines takes one engine or more, and at most one ONNX model to compare them with")
    ran = run_engines(engines, runs=runs, seed=seed)
    models = [timing(p, t) for p, t in zip(engines, ran.milliseconds, strict=True)]
    compared = [_compared(engines, ran, r) for r in references]
    return {
        "schema_version": SCHEMA_VERSION,
        "gpu": ran.gpu,
        "backend": ran.backend,
        "runs": runs,
        "models": models,
        "ratios": ratios(models),
        "compared": compared[0] if compared else [],
    }


def _compared(engines: Sequence[Path], ran: EngineRuns, reference: Path) -> list[dict[str, Any]]:
    model = Model.load(reference)
    session = make_session(reference, qdq_fusion=False) if runnable(model) is model else open_model(model)
    names = [o.name for o in session.get_outputs()]
    wanted = dict(zip(names, run(session, cast_feeds(session, ran.feeds)), strict=True))
    found = zip(engines, ran.outputs, strict=True)
    return [{"path": str(p), "reference": str(reference), **distance(wanted, made)} for p, made in found]


def distance(reference: Arrays, made: Arrays) -> dict[str, float]:
    """`sqnr_db, cosine, relative_error` over the outputs that both have.

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
    return {"sqnr_db": total.sqnr_db, "cosine": total.cosine, "relative_error": total.relative_error}
