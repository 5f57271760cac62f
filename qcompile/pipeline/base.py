"""Pass and everything that it is told and answers."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.observe import Probe, Stat
from qcompile.errors import UsageError
from qcompile.ir.model import Model
from qcompile.ir.select import ORIGIN, names, selected, with_width
from qcompile.quant.spec import Scheme
from qcompile.report import Remark, RemarkKind
from qcompile.target.target import Target

__all__ = [
    "AffineMap", "Comparator", "Comparison", "Fact", "Kind", "Pass", "PassContext", "PassResult", "Probe", "Stat",
    "StatisticsProvider", "option_name",
]  # fmt: skip

CLAIM = "qcompile.claimed_by"
FOLDED = "qcompile.input_folded"
KEPT = "qcompile.keep_float"
FOLD_ROWS = 512


class Kind(enum.Enum):
    """What a pass may change; the runner tests the contract of each kind."""

    EQUIVALENT = "equivalent"
    ANNOTATE = "annotate"
    FIT = "fit"
    LOWER = "lower"


class Fact(enum.Enum):
    """What is known of a model; passes require, establish and invalidate facts."""

    CANONICAL = "canonical"
    PADS_FOLDED = "pads-folded"
    BN_FOLDED = "bn-folded"
    DIMS_FOLDED = "dims-folded"
    STEM = "stem"
    GELU_ORDER = "gelu-order"
    OPSET = "opset"
    NORMS_FUSED = "norms-fused"
    QKV_SPLIT = "qkv-split"
    BIAS_RANK = "bias-rank"
    DECIDED = "decided"
    GELU_CODES = "gelu-codes"
    FITTED = "fitted"
    QUANTIZED = "quantized"
    HALF = "half"


@dataclass(frozen=True)
class AffineMap:
    """How a tensor's values changed: x' = (x - t) / r per channel; r, t float64 of shape [C] or []."""

    r: NDArray[np.float64]
    t: NDArray[np.float64]


class StatisticsProvider(Protocol):
    """Where the runner gets statistics from: one call, one sweep over the calibration data."""

    def collect(self, model: Model, probes: Sequence[Probe]) -> dict[Probe, Stat]: ...


@dataclass(frozen=True)
class Comparison:
    """Distance of two models' outputs: max|d| / max|y|, and the signal-to-noise ratio in dB."""

    relative_error: float
    sqnr_db: float
    samples: int


class Comparator(Protocol):
    """Runs models on the same inputs, ORT optimizations off."""

    def outputs(self, model: Model) -> Any:
        """What the model answers, in a form that `compare` reads."""
        ...

    def compare(self, reference: Any, candidate: Any) -> Comparison:
        """The distance of two models' outputs."""
        ...


@dataclass
class PassContext:
    """What a pass is told, and where its remarks go.

    `stats` answer its probes; `statistics` measures other models, for passes whose later steps depend on the first.
    """

    scheme: Scheme
    target: Target
    stats: Mapping[Probe, Stat] = field(default_factory=dict)
    statistics: StatisticsProvider | None = None
    seed: int = 0
    keep_float: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()
    bits: tuple[str, ...] = ()
    pass_name: str = ""
    remarks: list[Remark] = field(default_factory=list)
    _choices: dict[tuple[str, int, int], frozenset[Any]] = field(
        default_factory=dict[tuple[str, int, int], frozenset[Any]], init=False, repr=False
    )

    def applied(self, node: str, reason: str, **numbers: float | int | str) -> None:
        """A site was rewritten."""
        self._remark("applied", node, reason, numbers)

    def missed(self, node: str, reason: str, **numbers: float | int | str) -> None:
        """A site was skipped, and why."""
        self._remark("missed", node, reason, numbers)

    def note(self, node: str, reason: str, **numbers: float | int | str) -> None:
        """Something worth knowing that is neither."""
        self._remark("note", node, reason, numbers)

    def _remark(self, kind: RemarkKind, node: str, reason: str, numbers: Mapping[str, float | int | str]) -> None:
        self.remarks.append(Remark(kind, self.pass_name, node, reason, dict(numbers)))

    def any_excluded(self, nodes: Iterable[Any]) -> str | None:
        """Why the user's selectors leave one of `nodes` alone, or None."""
        return next((reason for node in nodes if (reason := self.excluded(node))), None)

    def excluded(self, node: Any) -> str | None:
        """Why the user's selectors leave `node` alone, or None; --keep-float wins over --quantize, that over --only."""
        kept = self._chosen_by(self.keep_float, node)
        if kept is not None:
            return f"kept in float by --keep-float {kept}"
        if self.only and self.forced(node) is None and self._chosen_by(self.only, node) is None:
            return f"not selected by --only {','.join(self.only)}"
        return None

    def forced(self, node: Any) -> str | None:
        """The --quantize selector that asks for `node` although the default leaves it in float, or None."""
        return self._chosen_by(self.quantize, node)

    def scheme_of(self, node: Any) -> Scheme:
        """The scheme with the widths of the last --bits selector that chooses `node`."""
        for selector, widths in map(with_width, reversed(self.bits)):
            if node in self._selected(selector, node.graph):
                return replace(self.scheme, name=widths.name, weight=widths.weight, activation=widths.activation)
        return self.scheme

    def _chosen_by(self, selectors: Sequence[str], node: Any) -> str | None:
        return next((s for s in selectors if node in self._selected(s, node.graph)), None)

    def _selected(self, selector: str, graph: Any) -> frozenset[Any]:
        key = (selector, id(graph), len(graph))
        if key not in self._choices:
            self._choices[key] = selected(selector, graph)
        return self._choices[key]


@dataclass(frozen=True)
class PassResult:
    """What a pass did: whether nodes, constants or decisions changed, and which tensors' values moved, how.

    A tensor that an EQUIVALENT pass changed in another way is listed in `changed`; `derived` names new tensors that
    are an affine map of an old one, which keeps its values.
    """

    modified: bool
    maps: Mapping[str, AffineMap] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()
    derived: Mapping[str, tuple[str, AffineMap]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pass:
    """Base of all passes: a frozen dataclass whose fields are its options.

    The first line of a subclass's docstring is its help.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[Kind] = Kind.EQUIVALENT
    requires: ClassVar[frozenset[Fact]] = frozenset()
    establishes: ClassVar[frozenset[Fact]] = frozenset()
    invalidates: ClassVar[frozenset[Fact]] = frozenset()

    def sugar(self) -> tuple[Pass, str]:
        """This pass without options that stand for other passes, and the pipeline string of those."""
        return self, ""

    def required(self, target: Target, scheme: Scheme) -> frozenset[Fact]:
        """Facts that must hold before `apply`, on this target."""
        return self.requires

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        """The statistics that `apply` will read, on `model` as it is now."""
        return ()

    def may_change(self, model: Model, ctx: PassContext) -> Iterable[str]:
        """Tensors whose values `apply` may move: statistics of them are not worth collecting early."""
        return ()

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Rewrite `model` in place.

        Raises:
            QcompileError: the model cannot go through this pass.
        """
        raise NotImplementedError

    def check_range(self, option: str, low: float, high: float) -> None:
        """Guard for numeric options.

        Raises:
            UsageError: the option's value is outside [low, high].
        """
        value = getattr(self, option)
        if not low <= value <= high:
            raise UsageError(f"{self.name}: {option_name(option)}={value} is outside [{low}, {high}]; choose a value inside")


def quantized_forms(target: Target, scheme: Scheme) -> frozenset[Fact]:
    """The forms of the graph that quantization needs: scales need their opset, packed qkv weights are split, ONNX Runtime's
    CPU kernels want theirs.  Passes that ask for statistics stand behind them, so that one sweep serves all."""
    forms = {Fact.PADS_FOLDED, Fact.OPSET}
    if scheme.activation is not None:
        forms |= {Fact.QKV_SPLIT, Fact.BIAS_RANK}
    if target.name == "ort" and scheme.activation is not None and not scheme.simulated:
        forms |= {Fact.STEM, Fact.GELU_ORDER}
    if target.name == "integer":
        forms |= {Fact.DIMS_FOLDED}
    if target.body(scheme) != "float32":
        forms |= {Fact.NORMS_FUSED}
    return frozenset(forms)


def option_name(field_name: str) -> str:
    """The spelling of an option in pipeline strings: block_size -> block-size."""
    return field_name.rstrip("_").replace("_", "-")


def mark_folded(node: Any) -> None:
    """Note on a linear layer that a fold changed the channels of its input."""
    node.metadata_props[FOLDED] = "1"


def input_folded(node: Any) -> bool:
    """Whether a fold changed the channels of this layer's input: its rows and per-channel extremes are known."""
    return FOLDED in node.metadata_props


def keep_float(node: Any, reason: str) -> None:
    """Note on a node that a pass made and that is not meant to be quantized."""
    node.metadata_props[KEPT] = reason


def kept_float(node: Any) -> str | None:
    """Why this node is not meant to be quantized, or None."""
    return node.metadata_props.get(KEPT)


def copy_notes(source: Any, target: Any) -> None:
    """Hand a node's notes on to the node that takes its place; selectors still find it by the old name."""
    target.metadata_props.setdefault(ORIGIN, names(source)[-1])
    target.metadata_props.update({k: v for k, v in source.metadata_props.items() if k in (CLAIM, FOLDED, KEPT)})


def claim(node: Any, pass_name: str) -> None:
    """Mark the producer of a fold site as rewritten by `pass_name`."""
    node.metadata_props[CLAIM] = pass_name


def claimed_by(node: Any) -> str | None:
    """The pass that rewrote this fold site first, or None."""
    return node.metadata_props.get(CLAIM)
