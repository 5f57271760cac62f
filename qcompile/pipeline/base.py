"""Pass and everything that it is told and answers."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from qcompile.calib.observe import Probe, Stat, Told
from qcompile.calib.observe.change import AffineMap
from qcompile.errors import UsageError
from qcompile.ir.model import Model
from qcompile.ir.select import Selection
from qcompile.quant.spec import Scheme
from qcompile.report import Comparison, Remarks
from qcompile.target.target import Target

__all__ = [
    "AffineMap", "Comparator", "Comparison", "Fact", "Kind", "Pass", "PassContext", "PassResult", "Probe", "Stat",
    "StatisticsProvider", "option_name",
]  # fmt: skip


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


class StatisticsProvider(Protocol):
    """Where the runner gets statistics from: one call, one sweep over the calibration data."""

    def collect(self, model: Model, probes: Sequence[Probe]) -> dict[Probe, Stat]: ...


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
    """What a pass is told: the scheme, the target, the user's selection, the answers to its probes; and where its remarks go.

    `statistics` measures other models, for passes whose later steps depend on the first.
    """

    scheme: Scheme
    target: Target
    selection: Selection = field(default_factory=Selection)
    told: Told = field(default_factory=Told)
    remarks: Remarks = field(default_factory=Remarks)
    statistics: StatisticsProvider | None = None
    seed: int = 0


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
    of_pass = {"fold-pad": Fact.PADS_FOLDED, "fold-bn": Fact.BN_FOLDED, "fold-dims": Fact.DIMS_FOLDED, "opset": Fact.OPSET,
               "space-to-depth": Fact.STEM, "gelu-order": Fact.GELU_ORDER, "fuse-norm": Fact.NORMS_FUSED,
               "split-qkv": Fact.QKV_SPLIT, "bias-rank": Fact.BIAS_RANK}  # fmt: skip
    return frozenset({Fact.PADS_FOLDED, *(of_pass[name] for name in target.forms(scheme))} - {Fact.BN_FOLDED})


def option_name(field_name: str) -> str:
    """The spelling of an option in pipeline strings: block_size -> block-size."""
    return field_name.rstrip("_").replace("_", "-")
