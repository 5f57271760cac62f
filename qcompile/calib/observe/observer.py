"""What is asked of a tensor, and what is told: observers, probes and their answers, typed end to end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar, cast

import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe.stat import Stat

S = TypeVar("S", bound=Stat)
S_co = TypeVar("S_co", bound=Stat, covariant=True)


class Observer(ABC, Generic[S]):
    """What to learn about a tensor; a frozen dataclass, so equal observers share one result.  `kind` names it in files."""

    kind: ClassVar[str]

    @abstractmethod
    def empty(self) -> S:
        """The statistic of no data."""

    @abstractmethod
    def observe(self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None) -> S:
        """The statistic of `array`, whose samples are numbered from `first_sample_index`.

        `samples` is how many samples the array holds, when that is not its first dimension (Swin's windows).
        """

    def of(self, value: ir.Value) -> Probe[S]:
        """Ask for this statistic of `value`."""
        return Probe(str(value.name), self)


@dataclass(frozen=True)
class Probe(Generic[S_co]):
    """Ask for `observer`'s statistic of the value named `tensor` of the main graph."""

    tensor: str
    observer: Observer[S_co]


class Told:
    """The statistics that answer probes, each of its probe's type."""

    def __init__(self, stats: Mapping[Probe[Any], Stat] | None = None) -> None:
        self._stats = {} if stats is None else stats

    def __getitem__(self, probe: Probe[S]) -> S:
        return cast("S", self._stats[probe])

    def get(self, probe: Probe[S]) -> S | None:
        """The answer, or None where the probe was not asked."""
        return cast("S | None", self._stats.get(probe))

    def items(self) -> Iterable[tuple[Probe[Any], Stat]]:
        """All probes with their answers."""
        return self._stats.items()
