"""What a calibration is asked to do: which statistics (as a compilation), and how they are gathered."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from qcompile.errors import UsageError
from qcompile.verbs.compile.options import StatisticsOptions
from qcompile.verbs.options import Written, size


def shard_of(text: str) -> tuple[int, int]:
    """(I, N) of `I/N` with 1 <= I <= N.

    Raises:
        UsageError: it is no shard.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"{text!r} is no shard; write I/N, for example 2/4")
    return int(match[1]), int(match[2])


def kinds_of(text: str) -> tuple[str, ...]:
    """The observers' names of `KIND,..`."""
    return tuple(k.strip() for k in text.split(",") if k.strip())


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(StatisticsOptions):
    """What is gathered, and by whom."""

    output: Annotated[
        Path | None,
        "Default here: MODEL.qstats. Continued if it is there.",
        Written("STATS.qstats", short="-o", once=True),
    ] = None
    observers: Annotated[
        tuple[str, ...],
        "Instead of what passes ask for: of all activations of MODEL as it is.",
        Written("KIND,..", read=kinds_of, once=True),
    ] = ()
    shard: Annotated[
        tuple[int, int] | None,
        "Only the I-th of N parts of the samples; join them with merge.",
        Written("I/N", read=shard_of, once=True),
    ] = None
    resume: Annotated[bool, "Fail if there is nothing to continue.", Written(once=True)] = False
    workers: Annotated[int | None, "Spread the samples over processes here.", Written(least=1, once=True)] = None
    dask: Annotated[
        str | None, "Spread them over a dask cluster: tcp://host:port, local or local:N.", Written("ADDRESS", once=True)
    ] = None
    mem_limit: Annotated[int | None, "Of each process; then saved every 1,024 samples only.", Written("SIZE", read=size)] = None
    threads: Annotated[int | None, "ONNX Runtime threads of each process; default: all cores.", Written(least=1)] = None


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """The output."""

    output: Annotated[Path, "The merged statistics.", Written("ALL.qstats", short="-o", once=True)]
