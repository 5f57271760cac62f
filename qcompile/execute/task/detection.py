"""Outputs of detectors, by part: boxes, scores and classes are unlike quantities, and each has its own error in its own unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qcompile.execute.figures import OutputTally
from qcompile.execute.metrics import Distance
from qcompile.execute.parts import PartTally
from qcompile.execute.task.metric import Batch
from qcompile.execute.task.score import Score


@dataclass
class Detection:
    """Every output, and every part of one that joins unlike quantities, beside the reference's; `outputs` are fresh tallies."""

    outputs: Sequence[OutputTally]
    samples: int = 0

    @property
    def title(self) -> str:
        """How many outputs."""
        return f"detection by part, {len(self.outputs)} output{'s' * (len(self.outputs) > 1)}, against the reference's"

    def add(self, batch: Batch) -> None:
        """Take a batch."""
        self.samples += len(batch.rows)
        for tally in self.outputs:
            tally.add(batch.reference[tally.name], batch.candidate[tally.name])

    def scores(self) -> tuple[Score, ...]:
        """`rms error of PART` in the part's own unit and `SQNR of PART` in dB; `equal of OUTPUT` of indices and classes."""
        return tuple(score for tally in self.outputs for score in self._of(tally))

    def _of(self, tally: OutputTally) -> list[Score]:
        figure = tally.figure()
        if figure.equal is not None:
            return [Score(f"equal of {tally.name}", None, figure.equal, self.samples, share=True)]
        if figure.sqnr_db is None:
            return []
        named = [(p.name, p.sqnr_db, p.rms_error) for p in tally.parts.every()]
        found = named or [(tally.name, figure.sqnr_db, tally.distance.rms_error)]
        of = "" if len(self.outputs) == 1 or not named else f" of {tally.name}"
        made = list[Score]()
        for name, db, error in found:
            made.append(Score(f"rms error of {name}{of}", None, error, self.samples, "lower"))
            made.append(Score(f"SQNR of {name}{of}", None, db, self.samples))
        return made


def fresh(tallies: Sequence[OutputTally]) -> list[OutputTally]:
    """The same outputs with nothing summed up."""
    return [replace(t, distance=Distance(), parts=PartTally(t.parts.join), entries=0, equal=0, apart=False) for t in tallies]
