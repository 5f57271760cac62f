"""`qcompile eval`: two models on data, and an integer-only model beside the integer oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from qcompile.calib.data import Dataset, load_data
from qcompile.calib.data.checks import check_data
from qcompile.calib.data.user import user_function
from qcompile.calib.sweep.alone import suited
from qcompile.errors import UsageError
from qcompile.execute.task.choice import Asked, Task
from qcompile.execute.task.custom import Custom
from qcompile.ir.model import InputInfo, Model
from qcompile.report import SCHEMA_VERSION, Progress, warned
from qcompile.verbs.evaluate.conformance import Conformance, conformance
from qcompile.verbs.evaluate.outputs import Evaluation, evaluate
from qcompile.verbs.guards import randomness
from qcompile.verbs.libraries import OrtLibraryOptions, load_libraries
from qcompile.verbs.options import Written


@dataclass(frozen=True, kw_only=True)
class EvalOptions(OrtLibraryOptions):
    """What is compared, on what."""

    data: Annotated[str, "As --calib of compile, with labels or pairs (docs/guide/accuracy.md).", Written("DATA")]
    task: Annotated[Task, "What is measured; auto: by the labels and the outputs."] = "auto"
    on: Annotated[str | None, "Output that it is measured on; default: the first that fits.", Written("OUTPUT")] = None
    metric: Annotated[
        tuple[str, ...], "Also measure by a function of yours; repeatable.", Written("FILE.py:FUNCTION", once=True)
    ] = ()
    preprocess: Annotated[str | None, "For pictures: a preset or a TOML file.", Written("SPEC")] = None
    samples: Annotated[int | None, "Default: all.", Written(least=1)] = None
    per_layer: Annotated[bool, "Also compare every tensor that both graphs name, worst first."] = False
    threads: Annotated[int | None, "ONNX Runtime threads; default: all cores.", Written(least=1)] = None
    oracle: Annotated[bool, "Integer-only models: is ONNX Runtime bit for bit what integer arithmetic gives?"] = False


@dataclass(frozen=True)
class Evaluated:
    """Both models and their distance (`evaluate`), the oracle's verdict (`conformance`), and what the data's checks say."""

    comparison: Evaluation | None
    oracle: Conformance | None
    notes: Sequence[str]

    @property
    def mismatches(self) -> int:
        """Elements that ONNX Runtime computes differently from the oracle."""
        return 0 if self.oracle is None else self.oracle.mismatches

    def to_json(self) -> dict[str, Any]:
        """`schema_version`, the keys of `Evaluation`, `oracle` and `notes`."""
        comparison = {} if self.comparison is None else self.comparison.to_json()
        oracle = {} if self.oracle is None else {"oracle": self.oracle.to_json()}
        return {"schema_version": SCHEMA_VERSION, **comparison, **oracle, "notes": list(self.notes)}


def run(reference: Path, candidate: Path | None, options: EvalOptions, progress: Progress) -> Evaluated:
    """Compare `candidate` with `reference`, and with the oracle what is an integer-only model.

    Raises:
        UsageError: one model, and no oracle.
        QcompileError: see `evaluate` and `conformance`.
    """
    if candidate is None and not options.oracle:
        raise UsageError("eval compares two models; give REFERENCE and CANDIDATE (or --oracle and one integer-only model)")
    load_libraries(options)
    model = Model.load(reference)
    inputs = model.inputs()
    data = suited(_data(options, inputs), model)
    metrics = [_custom(text) for text in options.metric]
    notes = warned([*randomness(model), *check_data(data, inputs, options.preprocess)], progress.note)
    told: dict[str, Any] = {"threads": options.threads, "progress": progress.on_sweep}
    asked = Asked(options.task, options.on, data.pairs)
    measured: dict[str, Any] = {"asked": asked, "metrics": metrics, "per_layer": options.per_layer}
    comparison = None if candidate is None else evaluate(reference, candidate, data, **measured, **told)
    notes += [] if comparison is None else warned(comparison.warnings, progress.note)
    oracle = conformance(candidate or reference, data, **told) if options.oracle else None
    return Evaluated(comparison, oracle, notes)


def _data(options: EvalOptions, inputs: Sequence[InputInfo]) -> Dataset:
    """The samples; of data with pairs whole pairs."""
    data = load_data(options.data, inputs, options.preprocess, options.samples)
    return data if options.samples is None or data.pairs is None else data.take_pairs(options.samples)


def _custom(text: str) -> Custom:
    """The user's function, which is imported: it stands on the command line.

    Raises:
        UsageError: no function is named.
        DataError: there is no such file or function, or the file fails.
    """
    file, _, function = text.rpartition(":")
    if not file.endswith(".py") or not function:
        raise UsageError(f"--metric {text!r} names no function; write FILE.py:FUNCTION")
    return Custom(user_function(Path(file), function), text)
