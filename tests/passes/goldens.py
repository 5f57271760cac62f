"""Golden files: what a pass string makes of a graph, in one listing.

    passes: canonicalize,bias-rank
    target: ort w8a8

    weights seed 1
      w = normal[16, 16]
      b = normal[16]

     graph opset=17 (x: FLOAT[N,5,16]) -> (y: FLOAT[N,5,16])
       m = MatMul(x, w) @fc
    -  y = Add(m, b) @bias
    +  y = Add(m, const<float32[1, 1, 16]: min -1.72941 max 2.0567 rms 1.03165>) @bias

    applied bias-rank bias: bias given the rank of the product

The input is the lines without `+`, the result the lines without `-`; what follows is what the passes said.  A new golden is
written by hand up to the end of its graph, each line behind one blank; `python tools/update_goldens.py` does the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from pathlib import Path

import numpy as np

from qcompile.ir.model import Model
from qcompile.pipeline import registry
from qcompile.report import PassReport
from tests.passes.models import Feeds
from tests.passes.running import context, run_passes
from tests.passes.text import Written, read_model

FOLDER = Path(__file__).parents[1] / "goldens"


@dataclass(frozen=True)
class Golden:
    """One file of the folder: `passes` run exactly on the graph that it holds."""

    path: Path

    @cached_property
    def _parts(self) -> list[str]:
        """Head, weights if there are any, graph, and (once it is written) remarks."""
        return self.path.read_text(encoding="utf-8").strip("\n").split("\n\n")

    @cached_property
    def head(self) -> dict[str, str]:
        """passes, target, samples."""
        return dict(line.split(": ", 1) for line in self._parts[0].splitlines())

    @cached_property
    def input(self) -> str:
        """Weights and graph as they go in."""
        start = next(i for i, part in enumerate(self._parts) if part[1:].startswith("graph "))
        graph = [line[1:] for line in self._parts[start].splitlines() if line[0] != "+"]
        return "\n".join([*self._parts[1:start], *graph])

    def run(self) -> tuple[Written, Model, list[PassReport]]:
        """The input, what the passes made of it, and what they said."""
        written, head = read_model(self.input), self.head
        (info,) = written.model.inputs()
        shape = (int(head.get("samples", 4)), *(int(d) for d in info.shape[1:]))
        arrays: Feeds = {info.name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
        after, reports = run_passes(written.model, registry.parse(head["passes"]), arrays, context(*head["target"].split()))
        return written, after, reports

    def text(self) -> str:
        """The file as it must be."""
        written, after, reports = self.run()
        given = self.input[self.input.index("graph ") :].splitlines()
        graph = "\n".join(_changes(given, written.print(after).splitlines()))
        weights = [part for part in self._parts[1:2] if part.startswith("weights ")]
        remarks = "\n".join(f"{r.kind} {r.pass_name} {r.node or '-'}: {r.reason}" for x in reports for r in x.remarks)
        return "\n\n".join([self._parts[0], *weights, graph, remarks]) + "\n"


def _changes(old: list[str], new: list[str]) -> Iterator[str]:
    for tag, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        yield from ((" " if tag == "equal" else "-") + line for line in old[a:b])
        yield from ("+" + line for line in new[c:d] if tag != "equal")


def goldens() -> list[Golden]:
    """All files of the folder."""
    return [Golden(path) for path in sorted(FOLDER.glob("*.txt"))]
