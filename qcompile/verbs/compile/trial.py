"""The file that was written, tried in its target's own setting before it takes its name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.backend import openvino, parser
from qcompile.backend.process import plugins
from qcompile.errors import BuildError, GateError, QcompileError
from qcompile.execute.compare import PART_BYTES, Answers, OrtComparator, runs_in_parts
from qcompile.execute.emulate.runnable import runnable
from qcompile.execute.opening import open_model, run_in_parts
from qcompile.execute.session import make_session, run
from qcompile.ir.model import Model
from qcompile.ir.reader import read_proto
from qcompile.ir.spill import is_large
from qcompile.oracle.graph import integer_graph
from qcompile.oracle.run import decode, encode, run_integer
from qcompile.report import Comparison
from qcompile.target.check import check
from qcompile.target.target import Target

T = TypeVar("T")
Feed = dict[str, NDArray[Any]]
NOTICED_DB = 1.0
MOST_DB = 6.0  # three quarters of the error
_STOPS = ("refused", "wrong")
_ONLY_LOADED = (
    "a model of this size is only loaded: its figure is of exact arithmetic; qcompile check knows whether it keeps the rules"
)
_UNSATURATED = {"session.x64quantprecision": "1"}
_EXACT_SAMPLES = 2


@dataclass
class FileTrial:
    """Tries a file (`qcompile.target.trial.Trial`), beside the `source` that it was made from.

    `passes` made the file.  `feeds` may be empty: then it is only loaded.  `reference`: the source's answers to the feeds of
    `comparator`.  `measured` and `warnings` are what was found.
    """

    target: Target
    source: Model
    feeds: Sequence[Feed]
    threads: int | None
    passes: str = ""
    comparator: OrtComparator | None = None
    reference: Answers | None = None
    expected: Comparison | None = None
    measured: Comparison | None = None
    warnings: list[str] = field(default_factory=list[str])

    def take(self, file: Path, expected: Comparison | None) -> None:
        """Try `file` from here on, which stands as far from the source as `expected` in exact arithmetic."""
        self.file, self.written, self.expected = file, Model.load(file), expected

    @property
    def large(self) -> bool:
        """Whether the rules or a default session, which hold all weights, would take more memory than the compilation."""
        return is_large(self.source.graph) or is_large(self.written.graph)

    def only_loads(self) -> None:
        """All that is tried of a large model."""
        self.loads()
        self.warnings.append(_ONLY_LOADED)

    def loads(self) -> None:
        """See `Trial`."""
        self._beside("ONNX Runtime does not run", lambda model, _: self._exactly(model))

    def keeps_rules(self) -> None:
        """See `Trial`."""
        found = self._refused(self.file)
        if not found:
            return
        known = {rule for rule, _ in self._refused(self.source.path)} if self.source.path is not None else set[str]()
        own = [text for rule, text in found if rule not in known]
        if own:
            raise GateError(
                f"the model breaks a rule of {self.target.name}: {own[0]}; see all with --passes '' and qcompile check"
            )
        if not plugins():
            self.warnings += [f"{text} (the float model has it, too)" for _, text in found[:1]]

    def runs(self) -> None:
        """See `Trial`."""
        self.measured = self._compared(self._as_deployed())
        if self._short_of(self.measured):
            self._explain()

    def parses(self) -> None:
        """See `Trial`."""
        if not parser.can_parse(self.target.name):
            return
        if why := parser.parse(self.file, self.target.name):
            float_too = self.source.path is not None and parser.parse(self.source.path, self.target.name)
            if not float_too:
                raise BuildError(f"the parser refuses the model, and reads the float one: {why}; see qcompile check")
            self.warnings.append(f"no engine can be built, from the float model neither: {why}")

    def runs_in_openvino(self) -> None:
        """See `Trial`."""
        if not openvino.is_installed():
            return
        answers = self._beside("OpenVINO does not run", lambda _, file: openvino.answers(file, self._fed()))
        self.measured = self._compared(answers)
        if (gap := self._short_of(self.measured)) and self.measured and self.expected:
            self.warnings.append(f"OpenVINO's kernels on this CPU cost {gap:.1f} dB: {self._apart()}")

    def computes_exactly(self) -> None:
        """See `Trial`."""
        answers = self._as_deployed()
        graph = integer_graph(read_proto(self.file), str(self.file.parent))
        for feed, theirs in list(zip(self._fed(), answers or (), strict=False))[:_EXACT_SAMPLES]:
            ours = decode(graph, run_integer(graph, encode(graph, feed)))
            wrong = next((v.name for v, a in zip(self.written.graph.outputs, theirs, strict=True) if not _same(ours, v, a)), None)
            if wrong is not None:
                raise GateError(f"ONNX Runtime's output {wrong!r} is not what integer arithmetic gives; please report it")

    # ----------------------------------------------------------------------------------------

    def _beside(self, what: str, attempt: Callable[[Model, Path], T]) -> T | None:
        """What `attempt` makes of the file; None where the source fails it, too."""
        try:
            return attempt(self.written, self.file)
        except QcompileError as error:
            failure = error
        why = _reason(failure)
        if self._source_passes(attempt):
            raise GateError(
                f"{what} the model that was made, and runs the float one: {why};"
                " keep what it names in float with --keep-float, and please report it"
            ) from failure
        self.warnings.append(f"{what} this model, the float one neither: {why}")
        return None

    def _source_passes(self, attempt: Callable[[Model, Path], Any]) -> bool:
        if self.source.path is None:
            return False
        with contextlib.suppress(QcompileError):
            attempt(self.source, self.source.path)
            return True
        return False

    def _exactly(self, model: Model) -> None:
        """A large model's weights are not run through again: it was compared part by part.  Many nodes open in parts."""
        if runs_in_parts(model) and not self.large:
            run_in_parts(runnable(model), self._fed()[:1], PART_BYTES, threads=self.threads)
            return
        session = open_model(model, exact=True, threads=self.threads)
        if self.feeds and not self.large:
            run(session, self._fed()[0])

    def _as_deployed(self) -> list[list[NDArray[Any]]] | None:
        return self._beside("a default ONNX Runtime session does not run", lambda _, file: self._deployed(file))

    def _deployed(self, file: Path, extra: dict[str, str] | None = None) -> list[list[NDArray[Any]]]:
        session = make_session(file, threads=self.threads, extra=extra)
        return [run(session, feed, None, i) for i, feed in enumerate(self._fed())]

    def _fed(self) -> list[Feed]:
        wanted = {i.name for i in self.source.inputs()}
        return [{name: array for name, array in feed.items() if name in wanted} for feed in self.feeds]

    def _refused(self, file: Path) -> list[tuple[str, str]]:
        """The rules by which the runtime refuses a file or computes wrongly, each with words."""
        stops = {rule.id for rule in self.target.rules if rule.effect in _STOPS}
        found = [f for f in check(file, self.target.name) if f.severity == "error" and f.rule in stops]
        return [(f.rule, f"{f.rule} at {f.node or 'the model'}: {f.message}; {f.fix}") for f in found]

    # figures --------------------------------------------------------------------------------

    def _compared(self, answers: list[list[NDArray[Any]]] | None) -> Comparison | None:
        if answers is None or not answers or self.comparator is None or self.reference is None:
            return None
        return self.comparator.compare(self.reference, Answers(answers, self.reference.tallies))

    def _short_of(self, measured: Comparison | None) -> float:
        """By how many dB the worst output is below what exact arithmetic gives; 0 where that is not worth a word."""
        if measured is None or self.expected is None or measured.sqnr_db is None or self.expected.sqnr_db is None:
            return 0.0
        gap = self.expected.sqnr_db - measured.sqnr_db
        return gap if gap > NOTICED_DB else 0.0

    def _explain(self) -> None:
        """Whether what is missing comes from sums that saturate."""
        with contextlib.suppress(QcompileError):
            better = self._compared(self._deployed(self.file, _UNSATURATED))
            if not self._short_of(better) or self._mostly(better):
                passes = ",".join(filter(None, (self.passes, "insert-qdq{weights=uint8}")))
                self.warnings.append(
                    f"ONNX Runtime's 8-bit kernels saturate on this CPU, which has no VNNI: {self._apart()};"
                    " run it with the session option session.x64quantprecision=1 or on a CPU with VNNI, or compile for this one:"
                    f" --passes '{passes}' (exact, slower)"
                )
                return
        self.warnings.append(
            f"ONNX Runtime's fused kernels are less exact than the pairs as they are written: {self._apart()};"
            " find the layer with eval --per-layer and leave it out with --keep-float"
        )

    def _mostly(self, better: Comparison | None) -> bool:
        """Whether most of the error is gone in `better`: the rest is what kernels round (an import is compared with itself)."""
        if better is None or self.measured is None or better.sqnr_db is None or self.measured.sqnr_db is None:
            return False
        return better.sqnr_db - self.measured.sqnr_db > MOST_DB

    def _apart(self) -> str:
        assert self.measured is not None and self.expected is not None
        return f"{self.measured.sqnr_db:.1f} dB as it runs here, {self.expected.sqnr_db:.1f} dB in exact arithmetic"


def _same(ours: Feed, output: ir.Value, theirs: NDArray[Any]) -> bool:
    return np.array_equal(ours[str(output.name)], theirs, equal_nan=theirs.dtype.kind == "f")


def _reason(error: QcompileError) -> str:
    """What went wrong, without what was advised."""
    return str(error).rpartition(";")[0] or str(error)
