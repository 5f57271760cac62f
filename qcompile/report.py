"""What happened, as data.  JSON first (with a schema version); terminal views are made from it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

SCHEMA_VERSION = 1

RemarkKind = Literal["applied", "missed", "note"]
Meter = Callable[[int, int], None]  # is told how many samples (or runs) are done, and how many there are
Note = Callable[[str], None]  # is told a line for the user


@dataclass(frozen=True)
class Remark:
    """One candidate site, rewritten (`applied`) or skipped with a reason (`missed`), or a `note`.

    `node` is the ONNX node's name; `numbers` holds measured values (JSON scalars).
    """

    kind: RemarkKind
    pass_name: str
    node: str
    reason: str
    numbers: Mapping[str, float | int | str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain dict with the keys kind, pass, node, reason, numbers."""
        return {
            "kind": self.kind,
            "pass": self.pass_name,
            "node": self.node,
            "reason": self.reason,
            "numbers": dict(self.numbers),
        }


@dataclass
class Remarks:
    """Where the pass `pass_name` says what it did: one remark a candidate site."""

    pass_name: str = ""
    all: list[Remark] = field(default_factory=list[Remark])

    def applied(self, node: str, reason: str, **numbers: float | int | str) -> None:
        """A site was rewritten."""
        self.all.append(Remark("applied", self.pass_name, node, reason, numbers))

    def missed(self, node: str, reason: str, **numbers: float | int | str) -> None:
        """A site was skipped, and why."""
        self.all.append(Remark("missed", self.pass_name, node, reason, numbers))

    def note(self, node: str, reason: str, **numbers: float | int | str) -> None:
        """Something worth knowing that is neither."""
        self.all.append(Remark("note", self.pass_name, node, reason, numbers))


@dataclass(frozen=True)
class OutputPart:
    """A part of an output that joins unlike quantities: where it lies, or the tensor that it is, its SQNR in dB, and the root of
    the mean squared error in its own unit."""

    name: str
    sqnr_db: float
    rms_error: float = 0.0


@dataclass(frozen=True)
class OutputFigure:
    """An output beside the float model's: the SQNR in dB of a float one, or the share of equal entries, in [0, 1].

    `note` says what makes it special: jumps, or randomness, which leaves no figure at all.  `parts`: worst first, where one of
    them stands far below the whole.
    """

    name: str
    sqnr_db: float | None = None
    equal: float | None = None
    note: str = ""
    parts: tuple[OutputPart, ...] = ()

    @property
    def worst_db(self) -> float | None:
        """The SQNR of the worst part, or of the whole."""
        return self.parts[0].sqnr_db if self.parts else self.sqnr_db


@dataclass(frozen=True)
class Comparison:
    """Distance of two models' outputs.

    `relative_error`: the largest max|d| / max|y| among the outputs that a small error moves a little, None where there is none;
    `errors`: by output.  `sqnr_db`: of the worst float output; None where none can be measured.  `outputs`: all, worst first.
    """

    relative_error: float | None
    sqnr_db: float | None
    samples: int
    errors: Mapping[str, float] = field(default_factory=dict[str, float])
    outputs: tuple[OutputFigure, ...] = ()


@dataclass(frozen=True)
class PassReport:
    """One executed pass: what it changed, how far outputs moved, what it cost.

    `float_db`: behind a quantized source, the SQNR to the float model inside it; `sqnr_db` is to the source itself.
    """

    spec: str
    kind: str
    modified: bool
    remarks: tuple[Remark, ...] = ()
    seconds: float = 0.0
    peak_rss_mb: float = 0.0
    verified: str = "not run"
    relative_error: float | None = None
    sqnr_db: float | None = None
    outputs: tuple[OutputFigure, ...] = ()
    float_db: float | None = None

    @property
    def comparison(self) -> Comparison:
        """Its figures alone."""
        return Comparison(self.relative_error, self.sqnr_db, 0, outputs=self.outputs)

    def to_json(self) -> dict[str, Any]:
        """Plain dict; remarks as dicts."""
        out = asdict(self)
        out["remarks"] = [r.to_json() for r in self.remarks]
        return out


class Progress(Protocol):
    """Who is told how far the work is."""

    def on_pass(self, spec: str, index: int, total: int) -> None: ...
    def on_done(self, report: PassReport) -> None: ...
    def on_sweep(self, done: int, total: int) -> None: ...
    def note(self, message: str) -> None: ...


class Silent:
    """Tells nobody."""

    def on_pass(self, spec: str, index: int, total: int) -> None: ...
    def on_done(self, report: PassReport) -> None: ...
    def on_sweep(self, done: int, total: int) -> None: ...
    def note(self, message: str) -> None: ...


SILENT = Silent()


def escaped(text: str, keep: str = "") -> str:
    r"""`text` with what would not print (control characters, escape codes, marks of direction) written as \x1b or \n.

    A name in a model may hold anything, and a terminal obeys it.  Characters in `keep` stay.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def listed(names: Sequence[str], most: int) -> str:
    """`a, b and 5 more`: the first `most` names, and how many are left out."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def warned(warnings: Sequence[str], note: Note) -> list[str]:
    """Tell each of them; they are handed back."""
    for text in warnings:
        note(f"warning: {text}")
    return list(warnings)


def json_text(document: Any) -> str:
    """The document as JSON text: NaN and infinity become null, numpy scalars numbers, paths strings."""
    return json.dumps(_plain(document), indent=2, allow_nan=False, default=str)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
