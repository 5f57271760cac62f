"""`qcompile check`: findings, their SARIF form, and a repaired copy of the model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import onnx

from qcompile._version import __version__
from qcompile.errors import ModelError, UsageError
from qcompile.ir.atomic import write_atomic
from qcompile.ir.model import Model
from qcompile.ir.reader import read_proto
from qcompile.oracle.cost import Cost
from qcompile.oracle.ranges import Bound, Proof
from qcompile.report import SCHEMA_VERSION, json_text
from qcompile.target.catalog import TARGETS
from qcompile.target.check import check
from qcompile.target.findings import Finding, Rule
from qcompile.target.repair import repair
from qcompile.target.sarif import sarif
from qcompile.target.view import GraphView
from qcompile.verbs.build import gpu_list, recorded_target
from qcompile.verbs.options import Written

__all__ = [
    "Bound", "CheckOptions", "Checked", "Cost", "Finding", "Proof", "Rule", "check_file", "check_model", "fix_file",
    "write_sarif",
]  # fmt: skip

INLINE_BYTES = 1_500_000_000  # a protobuf file ends at 2 GB
_ON_CODES = re.compile("Quant|QLinear|^Q[A-Z]|Integer|NBits|Bnb4")


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What is checked."""

    target: Annotated[str | None, "Default: what the model was compiled for, else trt.", Written(choices=TARGETS)] = None
    gpu: Annotated[str | None, "Also check what these GPUs can compute, e.g. sm86,sm89.", Written("SM,..")] = None
    fix: Annotated[bool, "Apply the mechanical fixes to a copy (-o) and check it again."] = False
    output: Annotated[Path | None, "The repaired model of --fix.", Written("FILE", short="-o")] = None


@dataclass(frozen=True)
class Checked:
    """The findings on a model (after a repair: those that remain), what a repair fixed and wrote, and the overflow proof."""

    target: str
    findings: tuple[Finding, ...]
    fixed: tuple[Finding, ...] = ()
    output: Path | None = None
    proof: Proof | None = None
    quantized: bool = True
    """Whether any operator works on codes: of a float model most rules have nothing to say."""

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that are errors."""
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of the target."""
        return tuple(TARGETS[self.target].rules)

    def to_json(self) -> dict[str, Any]:
        """`schema_version, target, quantized, errors, warnings` of `rule, node, message, fix, fixable`; with a repair `fixed,
        output`; of an integer-only model `proof_complete, assumptions, worst, proof` (see `qcompile.oracle.ranges.Proof`)."""
        errors, warnings = ([_finding(f, self.target) for f in self.findings if f.severity == s] for s in ("error", "warning"))
        document: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "target": self.target, "quantized": self.quantized}
        document |= {"errors": errors, "warnings": warnings}
        if self.output is not None:
            document |= {"fixed": [_finding(f, self.target) for f in self.fixed], "output": str(self.output)}
        return document | (self.proof.to_json() if self.proof is not None else {})

    def to_sarif(self, file: str) -> dict[str, Any]:
        """The findings as a SARIF document about `file`."""
        return sarif(self.findings, TARGETS[self.target].rules, file, __version__)


def _finding(f: Finding, target: str) -> dict[str, Any]:
    fixable = next(r.repair is not None for r in TARGETS[target].rules if r.id == f.rule)
    return {"rule": f.rule, "node": f.node, "message": f.message, "fix": f.fix, "fixable": fixable}


def check_model(model: Path, options: CheckOptions) -> Checked:
    """The findings on a model, or on its repaired copy.

    Raises:
        UsageError: --fix without -o, or the other way round; a GPU's name.
        ModelError: see `check_file` and `fix_file`.
    """
    if options.fix != (options.output is not None):
        missing, have = ("-o FIXED.onnx", "--fix") if options.fix else ("--fix", "-o")
        raise UsageError(f"{have} needs {missing}: the repaired model is a new file")
    target, gpus = options.target or recorded_target(model, TARGETS), gpu_list(options.gpu) if options.gpu else ()
    if options.output is None:
        return check_file(model, target, gpus)
    return fix_file(model, options.output, target, gpus)


def check_file(model: Path, target: str, gpus: Sequence[str] = ()) -> Checked:
    """The rule checker's findings on a file.

    Raises:
        ModelError: not an ONNX file, or its external data is missing.
    """
    view = GraphView.open(model)
    found = tuple(check(view, target, gpus))
    return Checked(target, found, proof=TARGETS[target].proof(view), quantized=_quantized(view.model))


def fix_file(model: Path, output: Path, target: str, gpus: Sequence[str] = ()) -> Checked:
    """Write a copy of `model` with the mechanical fixes to `output`, and check it again.

    Raises:
        UsageError: `output` is `model`.
        ModelError: `model` cannot be read, or `output` cannot be written; nothing half-written is left.
    """
    if output.resolve() == model.resolve():
        raise UsageError(f"-o {output} is the input, which is never overwritten; choose another name")
    check(model, target, gpus)  # says what is wrong with the file before its weights are read
    done = repair(read_proto(model), target, gpus)
    _save(done.model, output)
    return Checked(target, tuple(done.remaining), tuple(done.fixed), output, quantized=_quantized(done.model))


def _quantized(model: onnx.ModelProto) -> bool:
    return any(_ON_CODES.search(n.op_type) for n in model.graph.node)


def _save(model: onnx.ModelProto, output: Path) -> None:
    if model.ByteSize() > INLINE_BYTES:
        Model.from_proto(model).save(output)
        return
    try:
        write_atomic(output, model.SerializeToString(deterministic=True))
    except OSError as error:
        raise ModelError(f"cannot write {output}: {error.strerror or error}; choose another place with -o") from error


def write_sarif(checked: Checked, model: Path, output: Path) -> None:
    """Write the SARIF document about `model` to `output`, atomically.

    Raises:
        ModelError: `output` cannot be written.
    """
    try:
        write_atomic(output, json_text(checked.to_sarif(model.name)) + "\n")
    except OSError as error:
        raise ModelError(f"cannot write {output}: {error.strerror or error}; choose another place with --sarif") from error
