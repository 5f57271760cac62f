"""What is asked of a tensor, and what is told: observers, probes and their answers, typed end to end.

An observer knows everything about itself; sweeps, memory plans and files only ask it.  A new one is a class of its own
file: `empty` and `observe`, and whatever else it does better than these two (see `Observer`).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe.chunks import CHUNK
from qcompile.calib.observe.stat import Stat, width

S = TypeVar("S", bound=Stat)
S_co = TypeVar("S_co", bound=Stat, covariant=True)


@dataclass(frozen=True)
class Reduction:
    """What ONNX Runtime computes of a tensor in an observer's place: an output for each of `operators`, ONNX's Reduce
    operators over `axes`, or Size.  `sums` show NaN and infinity by themselves (extremes do not) and need float32."""

    operators: tuple[str, ...]
    axes: tuple[int, ...]
    sums: bool = False


@dataclass(frozen=True, eq=False)
class Seen:
    """A batch as an observer sees it: `samples` samples from number `first` on, of chunk number `chunk`.

    `arrays` are the outputs of the observer's `Reduction` where `reduced`, else the tensor and what else it `reads`.
    """

    arrays: tuple[NDArray[Any], ...]
    reduced: bool
    first: int
    samples: int
    chunk: int

    @property
    def chunk_first(self) -> int:
        """A sample number that stands for the chunk."""
        return self.chunk * CHUNK


@dataclass
class Tally(ABC, Generic[S]):
    """A statistic in the making, touched by one thread at a time."""

    known: S

    @abstractmethod
    def add(self, seen: Seen) -> None:
        """Count one more batch; batches come in order."""

    def told(self) -> S:
        """What is known so far; it does not change when more is added."""
        return self.known


class Observer(ABC, Generic[S]):
    """What to learn about a tensor; a frozen dataclass, so equal observers share one result.

    `kind` names a class in files and on the command line (see `Observer.kinds`); one without a kind stays in the process.
    `infinities`: NaN and infinite values are `searched` for by the sweep, `refused` by `from_batch` and tallies themselves
    (ValueError), or `allowed`.
    """

    kinds: ClassVar[dict[str, type[Observer[Any]]]] = {}
    kind: ClassVar[str]
    infinities: ClassVar[Literal["searched", "refused", "allowed"]] = "searched"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" not in cls.__dict__:
            return
        if cls.kind in Observer.kinds:
            raise TypeError(f"two observers are called {cls.kind!r}; rename one")
        Observer.kinds[cls.kind] = cls

    @abstractmethod
    def empty(self) -> S:
        """The statistic of no data."""

    @abstractmethod
    def observe(self, array: NDArray[Any], first_sample_index: int = 0, samples: int | None = None) -> S:
        """The statistic of `array`, whose samples are numbered from `first_sample_index`.

        `samples` is how many samples the array holds, when that is not its first dimension (Swin's windows).
        """

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the other tensors that it reads."""
        return ()

    @property
    def follows(self) -> bool:
        """Whether its statistic can be carried through a per-channel x' = (x - t) / r (`Stat.mapped`)."""
        return False

    def in_graph(self, rank: int) -> Reduction | None:
        """What the graph can compute of a float tensor with `rank` >= 1 axes in its place; None: it takes the tensor."""
        return None

    def from_batch(self, seen: Seen) -> S:
        """The statistic of one batch."""
        return self.observe(seen.arrays[0], seen.first, seen.samples)

    def tally(self, known: S) -> Tally[S]:
        """Batches on top of `known`."""
        return _Merged(known, self)

    def nbytes(self, shape: Sequence[int]) -> int:
        """About how many bytes its statistic takes for a tensor of `shape`."""
        return 64 * width(shape)

    def of(self, value: ir.Value) -> Probe[S]:
        """Ask for this statistic of `value`."""
        return Probe(str(value.name), self)

    def to_json(self) -> dict[str, Any]:
        """Its kind and its fields."""
        return {"kind": self.kind, "fields": dataclasses.asdict(cast("Any", self))}

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Observer[Any]:
        """What `to_json` gave.  Raises KeyError or TypeError: no observer has this kind, or these fields."""
        return Observer.kinds[document["kind"]](**document["fields"])

    def read(self, arrays: dict[str, NDArray[Any]]) -> S:
        """The statistic that `Stat.to_arrays` wrote."""
        return self.empty().from_arrays(arrays)


@dataclass
class _Merged(Tally[S]):
    """Batch by batch."""

    observer: Observer[S]

    def add(self, seen: Seen) -> None:
        self.known = self.known.merge(self.observer.from_batch(seen)).folded(seen.chunk)


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

    def of(self, kind: type[Observer[S]]) -> Iterator[tuple[str, S]]:
        """(tensor, answer) of every probe with an observer of this class."""
        return ((p.tensor, cast("S", s)) for p, s in self._stats.items() if type(p.observer) is kind)
