"""`qcompile decode`: the runs of several steps of decoding, as calibration data."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np

from qcompile.calib.data.sources import load_data
from qcompile.errors import DataError
from qcompile.execute.decode import Arrays, decoder_of, steps_of
from qcompile.execute.opening import open_model
from qcompile.ir.model import Model
from qcompile.report import SCHEMA_VERSION
from qcompile.verbs.options import Written

STEPS, PROMPTS = 8, 16


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """What is decoded, and where the runs go."""

    data: Annotated[str, "Prompts, and what else does not change (an encoder's output): as --calib of compile.", Written("DATA")]
    prompts: Annotated[int | None, f"Spread evenly over DATA; default: at most {PROMPTS}.", Written(least=1)] = None
    steps: Annotated[int, "Tokens behind each prompt.", Written(least=0)] = STEPS
    skip_prompt: Annotated[bool, "Leave out the runs without a past: for an engine of single steps."] = False
    output: Annotated[Path | None, "Default: MODEL.calib, which compile finds beside MODEL.", Written("DIR", short="-o")] = None


@dataclass(frozen=True)
class Decoded:
    """The folder, and what it holds: `caches` is the number of tensors that a run hands to the next."""

    output: Path
    prompts: int
    runs: int
    caches: int

    def to_json(self) -> dict[str, Any]:
        """`schema_version, output, prompts, runs, caches`."""
        held = {"prompts": self.prompts, "runs": self.runs, "caches": self.caches}
        return {"schema_version": SCHEMA_VERSION, "output": str(self.output), **held}


def decode(model: str | Path, options: DecodeOptions) -> Decoded:
    """Run `model` on its own past, and write what each run read into a folder, one `.npz` a run.

    Raises:
        ModelError: the model is no decoder with a cache (`qcompile.execute.decode`).
        DataError: the data does not fit, or the folder exists.
    """
    loaded, out = Model.load(model), options.output or Path(model).with_suffix(".calib")
    decoder = decoder_of(loaded)
    if out.exists():
        raise DataError(f"{out} exists; remove it, or name another folder with -o")
    data = load_data(options.data, decoder.given)
    data, session = data.take(options.prompts or PROMPTS), open_model(loaded)
    runs = 0
    staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        staging.mkdir(parents=True)
        for number, given in enumerate(data.batches(1)):
            fixed = {i.name: given[i.name] for i in decoder.given}
            for feed in _wanted(steps_of(decoder, session, fixed, options.steps), options.skip_prompt, [*decoder.caches]):
                _save(staging / f"prompt{number:04d}-run{runs:05d}.npz", feed)
                runs += 1
        if not runs:
            raise DataError("no run has a past; give --steps of 1 or more")
        os.replace(staging, out)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}; choose another place with -o") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Decoded(out, len(data), runs, len(decoder.caches))


def _save(path: Path, feed: Arrays) -> None:
    cast(Any, np.savez)(path, **feed)


def _wanted(feeds: Iterator[Arrays], skip_prompt: bool, caches: list[str]) -> Iterator[Arrays]:
    """All runs, or those that have a past."""
    return (feed for feed in feeds if not skip_prompt or all(feed[name].size for name in caches))
