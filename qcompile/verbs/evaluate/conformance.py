"""`qcompile eval --oracle`: does ONNX Runtime compute exactly what the integer oracle computes?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qcompile.calib.data.dataset import Dataset
from qcompile.errors import DataError
from qcompile.execute.feeds import cast_feeds, pad_batch
from qcompile.execute.session import Optimize, Session, batch_length, make_session, run
from qcompile.ir.reader import read_proto
from qcompile.oracle.graph import IntegerGraph, integer_graph
from qcompile.oracle.run import decode, encode, run_integer
from qcompile.report import Meter

Array = NDArray[Any]
BATCH = 16
LEVELS: tuple[Optimize, ...] = ("off", "basic", "all")
THREADS = (1, 2)


@dataclass(frozen=True)
class OracleRun:
    """Elements of one session's outputs that equal the oracle's, those that do not, and the first sample that has one."""

    optimize: Optimize
    threads: int
    matches: int
    mismatches: int
    first_sample: int | None


@dataclass(frozen=True)
class Conformance:
    """ONNX Runtime beside the oracle, a run for each of its settings."""

    path: Path
    samples: int
    runs: tuple[OracleRun, ...]

    @property
    def matches(self) -> int:
        """Equal elements of all runs."""
        return sum(r.matches for r in self.runs)

    @property
    def mismatches(self) -> int:
        """Different elements of all runs."""
        return sum(r.mismatches for r in self.runs)

    def to_json(self) -> dict[str, Any]:
        """`path, samples, matches, mismatches, runs`."""
        total = {"matches": self.matches, "mismatches": self.mismatches}
        return {"path": str(self.path), "samples": self.samples, **total, "runs": [asdict(r) for r in self.runs]}


@dataclass
class _Tally:
    """What is counted while a session runs."""

    optimize: Optimize
    threads: int
    session: Session
    matches: int = 0
    mismatches: int = 0
    first_sample: int | None = None

    def add(self, ours: Sequence[Array], theirs: Sequence[Array], first: int) -> None:
        """Compare the outputs of a batch that starts at sample `first`."""
        for a, b in zip(ours, theirs, strict=True):
            differs = np.not_equal(a, b) if a.shape == b.shape and a.dtype == b.dtype else np.ones(a.shape, bool)
            wrong = int(differs.sum())
            self.mismatches += wrong
            self.matches += differs.size - wrong
            if wrong and self.first_sample is None:
                self.first_sample = first + int(np.argwhere(differs)[0][0])

    def counted(self) -> OracleRun:
        """What is known at the end."""
        return OracleRun(self.optimize, self.threads, self.matches, self.mismatches, self.first_sample)


def conformance(model: str | Path, data: Dataset, *, threads: int | None = None, progress: Meter | None = None) -> Conformance:
    """Run an integer-only model with the oracle and with ONNX Runtime's CPU provider on all of `data`.

    ONNX Runtime runs with optimizations off, basic and all, on 1 and 2 threads (or on `threads` only).  Outputs are
    compared element by element, for equality.

    Raises:
        ModelError: not an integer-only ONNX model.
        DataError: the data holds no samples.
        GateError: an operation of the model overflows.
        InputError: ONNX Runtime fails on a batch.
    """
    if not len(data):
        raise DataError("there are no samples to evaluate on; give more data")
    path = Path(model)
    proto = read_proto(path)
    graph = integer_graph(proto, str(path.parent))
    tallies = [_tally(path, level, t) for level in LEVELS for t in (THREADS if threads is None else (threads,))]
    _run(graph, tallies, data, _fixed_batch(proto), progress)
    return Conformance(path, len(data), tuple(t.counted() for t in tallies))


def _fixed_batch(model: onnx.ModelProto) -> int | None:
    """The samples that the model takes a run, if its first axis says so."""
    stored = {t.name for t in model.graph.initializer}
    dims = [i.type.tensor_type.shape.dim for i in model.graph.input if i.name not in stored]
    sizes = {d[0].dim_value if d[0].HasField("dim_value") else None for d in dims if d}
    return sizes.pop() if len(sizes) == 1 else None


def _tally(path: Path, level: Optimize, threads: int) -> _Tally:
    session = make_session(path, optimize=level, threads=threads, use=["CPUExecutionProvider"])
    return _Tally(level, threads, session)


def _run(graph: IntegerGraph, tallies: list[_Tally], data: Dataset, fixed: int | None, progress: Meter | None) -> None:
    done = 0
    for batch in data.batches(fixed or BATCH):
        feeds = cast_feeds(tallies[0].session, batch if fixed is None else pad_batch(batch, fixed))
        ours = decode(graph, run_integer(graph, encode(graph, feeds)))
        for tally in tallies:
            names = [o.name for o in tally.session.get_outputs()]
            tally.add([ours[n] for n in names], run(tally.session, feeds, None, done), done)
        done += batch_length(batch)
        if progress is not None:
            progress(done, len(data))
