"""Pass and everything that it is told and answers."""

from __future__ import annotations

import enum
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from qcompile.calib.observe import Probe, Stat, Told
from qcompile.calib.observe.change import Changes
from qcompile.errors import UsageError
from qcompile.ir.model import Model
from qcompile.ir.select import Selection
from qcompile.quant.spec import Scheme
from qcompile.report import Comparison, Remarks
from qcompile.target.target import Choices, Request, Target

__all__ = [
    "Changes", "Comparator", "Comparison", "Kind", "Needs", "Pass", "PassContext", "PassResult", "Probe", "Rounds", "Stage",
    "Stat", "option_name",
]  # fmt: skip


class Kind(enum.Enum):
    """What a pass may change; the runner tests the contract of each kind."""

    EQUIVALENT = "equivalent"
    ANNOTATE = "annotate"
    FIT = "fit"
    LOWER = "lower"


class Stage(enum.IntEnum):
    """How far a model is, in order: a pass needs one and may bring the model to a later one."""

    SOURCE = 0
    CANONICAL = 1
    FORMED = 2
    DECIDED = 3
    FITTED = 4
    LOWERED = 5


EQUIVALENT_TOLERANCE = 5e-6
"""How far an EQUIVALENT pass may move the outputs, of their size."""


@dataclass(frozen=True)
class Needs:
    """The pass `by` has to know `probes` of `model`: one sweep over the calibration data."""

    model: Model
    probes: tuple[Probe[Any], ...]
    by: str


class Comparator(Protocol):
    """Runs models on the same inputs, ORT optimizations off."""

    def outputs(self, model: Model) -> Any:
        """What the model answers, in a form that `compare` reads."""
        ...

    def compare(self, reference: Any, candidate: Any) -> Comparison:
        """The distance of two models' outputs."""
        ...

    def noise(self, model: Model, answers: Any) -> Mapping[str, float]:
        """How far the outputs of `model` move by rounding alone, by output: relative to their size, as `Comparison.errors`."""
        ...


@dataclass
class PassContext:
    """What a pass is told: the scheme, the target, the user's selection, the answers to its probes; and where its remarks go."""

    scheme: Scheme
    target: Target
    selection: Selection = field(default_factory=Selection)
    told: Told = field(default_factory=Told)
    remarks: Remarks = field(default_factory=Remarks)
    seed: int = 0

    def request(self, choices: Choices | None = None) -> Request:
        """What the target's placement is asked for."""
        return Request(self.target, self.scheme, self.selection, choices or Choices())


@dataclass(frozen=True)
class PassResult:
    """What a pass did: whether nodes, constants or decisions changed, and which tensors' values moved, how.

    `tolerance`: how far an EQUIVALENT pass may move the outputs, of their size: more than rounding in float32 where it changed
    the types of a computation.
    """

    modified: bool
    changes: Changes = field(default_factory=Changes)
    tolerance: float = EQUIVALENT_TOLERANCE


Rounds = Generator[Needs, Mapping[Probe[Any], Stat], PassResult]
"""A pass at work: asks for statistics of models that it makes on the way, and returns what it did."""


@dataclass(frozen=True)
class Pass:
    """Base of all passes: a frozen dataclass whose fields are its options.

    The first line of a subclass's docstring is its help.  `needs` is the stage that the model must have reached, `reaches` the
    one that this pass brings it to; `after` names passes that must have run before, and that the planner puts in front if they
    have not.  `imports`: it takes the Q/DQ nodes of a quantized model out; `ends`: named last, nothing is put behind it.
    `changes_function` tells that the float function is meant to change; `looks_first` that `apply` asks finders only
    before it rewrites, and forgets their answers itself.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[Kind] = Kind.EQUIVALENT
    needs: ClassVar[Stage] = Stage.FORMED
    reaches: ClassVar[Stage] = Stage.SOURCE
    after: ClassVar[tuple[str, ...]] = ()
    changes_function: ClassVar[bool] = False
    looks_first: ClassVar[bool] = False
    imports: ClassVar[bool] = False
    ends: ClassVar[bool] = False

    @classmethod
    def is_form(cls) -> bool:
        """Whether it only brings the float graph into a form: forms are inserted where the target wants them."""
        return cls.kind is Kind.EQUIVALENT and cls.needs < Stage.FORMED and not cls.changes_function

    @classmethod
    def wanted(cls, target: Target, scheme: Scheme) -> bool:
        """Whether the planner inserts this form for `target` and `scheme`."""
        return cls.name in target.forms(scheme)

    def sugar(self) -> tuple[Pass, str]:
        """This pass without options that stand for other passes, and the pipeline string of those."""
        return self, ""

    def scheme_for(self, scheme: Scheme) -> Scheme:
        """The scheme that the user means who writes this pass."""
        return scheme

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe[Any]]:
        """The statistics that `apply` will read, on `model` as it is now."""
        return ()

    def moves(self, model: Model, ctx: PassContext) -> Iterable[str]:
        """Tensors whose values `apply` will surely move: their statistics are not worth collecting early."""
        return ()

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Rewrite `model` in place.

        Raises:
            QcompileError: the model cannot go through this pass.
        """
        raise NotImplementedError

    def rounds(self, model: Model, ctx: PassContext) -> Rounds:
        """`apply`, for passes whose later steps need statistics that depend on the first: each is a `yield Needs(...)`."""
        return self.apply(model, ctx)
        yield

    def check_range(self, option: str, low: float, high: float) -> None:
        """Guard for numeric options.

        Raises:
            UsageError: the option's value is outside [low, high].
        """
        value = getattr(self, option)
        if not low <= value <= high:
            raise UsageError(f"{self.name}: {option_name(option)}={value} is outside [{low}, {high}]; choose a value inside")


def option_name(field_name: str) -> str:
    """The spelling of an option in pipeline strings: block_size -> block-size."""
    return field_name.rstrip("_").replace("_", "-")
