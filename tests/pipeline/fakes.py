"""Passes, statistics and comparators whose behaviour a test decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from qcompile.calib.observe import AbsMax, AbsMaxStat, MinMax, MinMaxStat, Observer, Probe, Stat
from qcompile.calib.observe.change import AffineMap, Changes
from qcompile.ir.edit import set_constant
from qcompile.ir.model import Model
from qcompile.pipeline.base import Comparison, Kind, Needs, Pass, PassContext, PassResult, Stage
from qcompile.quant.spec import SCHEMES
from qcompile.target.catalog import TARGETS

SCHEME, TARGET = SCHEMES["w8a8"], TARGETS["ort"]


def context(**options: object) -> PassContext:
    return PassContext(SCHEME, TARGET, **options)  # type: ignore[arg-type]


@dataclass
class CountingStatistics:
    """Answers every probe with [-1, 3] over four channels and remembers each sweep."""

    calls: list[list[Probe]] = field(default_factory=list[list[Probe]])

    def __call__(self, needs: Needs) -> dict[Probe, Stat]:
        self.calls.append(list(needs.probes))
        return {p: _answer(p.observer) for p in needs.probes}


def _answer(observer: Observer) -> Stat:
    if isinstance(observer, MinMax):
        return MinMaxStat(np.full(4, -1.0), np.full(4, 3.0))
    return AbsMaxStat(np.asarray(3.0))


@dataclass
class FixedComparator:
    """Claims the same distance between any two models, and remembers what it compared."""

    relative_error: float = 0.0
    seen: list[tuple[Model, Model]] = field(default_factory=list[tuple[Model, Model]])

    ran: list[Model] = field(default_factory=list[Model])
    rounding: float = 0.0
    noisy: list[Model] = field(default_factory=list[Model])

    def outputs(self, model: Model) -> Model:
        """The model as it is now stands for its outputs."""
        self.ran.append(model)
        return model.clone()

    def compare(self, reference: Model, candidate: Model) -> Comparison:
        self.seen.append((reference, candidate))
        return Comparison(self.relative_error, 40.0, 9, {"y": self.relative_error})

    def noise(self, model: Model, answers: Model) -> dict[str, float]:
        self.noisy.append(model)
        return {"y": self.rounding}


_MINMAX = MinMax(-1)


def hidden(default: Any) -> Any:
    """A field that pipeline strings do not show."""
    return field(default=default, metadata={"option": False})


@dataclass(frozen=True)
class Fake(Pass):
    """Does what the test says."""

    name: ClassVar[str] = "fake"
    kind: ClassVar[Kind] = Kind.EQUIVALENT
    asks: tuple[str, ...] = hidden(())
    touches: tuple[str, ...] = hidden(())
    maps: tuple[str, ...] = hidden(())
    changed: tuple[str, ...] = hidden(())
    observer: Observer = hidden(_MINMAX)  # noqa: RUF009
    act: Callable[[Model, PassContext], bool] = hidden(lambda model, ctx: True)  # noqa: RUF009

    def probes(self, model: Model, ctx: PassContext) -> Iterable[Probe]:
        return (Probe(t, self.observer) for t in self.asks)

    def moves(self, model: Model, ctx: PassContext) -> Iterable[str]:
        return self.touches

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        modified = self.act(model, ctx)
        change = AffineMap(np.full(4, 2.0), np.full(4, 1.0))
        return PassResult(modified, Changes(dict.fromkeys(self.maps, change), set(self.changed)))


@dataclass(frozen=True)
class Other(Fake):
    """A second one, under another name."""

    name: ClassVar[str] = "other"


@dataclass(frozen=True)
class FakeFit(Fake):
    """Fits values."""

    name: ClassVar[str] = "fake-fit"
    kind: ClassVar[Kind] = Kind.FIT


@dataclass(frozen=True)
class FakeLower(Fake):
    """Lowers."""

    name: ClassVar[str] = "fake-lower"
    kind: ClassVar[Kind] = Kind.LOWER


@dataclass(frozen=True)
class FakeNote(Fake):
    """Annotates."""

    name: ClassVar[str] = "fake-note"
    kind: ClassVar[Kind] = Kind.ANNOTATE


@dataclass(frozen=True)
class FakeForm(Fake):
    """Brings the graph into a form."""

    name: ClassVar[str] = "fake-form"
    needs: ClassVar[Stage] = Stage.CANONICAL


@dataclass(frozen=True)
class NeedsSplit(Fake):
    """Comes behind another pass."""

    name: ClassVar[str] = "needs-split"
    needs: ClassVar[Stage] = Stage.CANONICAL
    after: ClassVar[tuple[str, ...]] = ("split-qkv",)


def ask_absmax(tensor: str) -> Fake:
    """A pass that asks for what cannot be carried over."""
    return Fake(asks=(tensor,), observer=AbsMax())


def scale_weight(model: Model, ctx: PassContext, factor: float = 1.5) -> bool:
    """Break equivalence: multiply the first constant of the first product."""
    node = next(n for n in model.graph if n.op_type == "MatMul")
    tensor = node.inputs[1].const_value if node.inputs[1] is not None else None
    assert tensor is not None
    set_constant(node, 1, tensor.numpy() * factor)
    return True
