"""The rule checker and the builder agree on generated graphs (built with TensorRT-RTX in a few processes)."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile.target.catalog import TARGETS
from qcompile.target.check import check
from tests.target.agreement import EFFECT, disagreements
from tests.target.builds import build_all
from tests.target.fuzz import cases, fixed_batch

COUNT = 240


@pytest.mark.rtx
def test_checker_and_builder_agree(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graphs = list(cases(COUNT))
    for case in graphs:
        fixed_batch(case.model)
    built = build_all([(c.model, c.gpu) for c in graphs], tmp_path)
    found = {c.name: list(disagreements(c, b)) for c, b in zip(graphs, built, strict=True)}
    assert {name: said for name, said in found.items() if said} == {}
    assert 0.5 * COUNT < sum(b.ok for b in built) < 0.95 * COUNT, "both sides of the border are reached"


def test_the_graphs_reach_most_rules() -> None:
    """Every rule about precision is met by the generated graphs, except those that need a form of their own (see the matrix)."""
    graphs = list(cases(COUNT))
    met = {f.rule for c in graphs for f in check(fixed_batch(c.model), "rtx", [c.gpu])}
    silent = {rule for rule, effect in EFFECT.items() if effect == "float"} - met
    assert len(met) >= 30, sorted(met)
    assert not silent, f"no generated graph breaks {sorted(silent)}"


def test_graphs_are_repeatable() -> None:
    first, second = list(cases(16, seed=9)), list(cases(16, seed=9))
    assert [c.model.SerializeToString(deterministic=True) for c in first] == [
        c.model.SerializeToString(deterministic=True) for c in second
    ]


def test_every_rule_of_consequence_says_so() -> None:
    assert all(r.effect != "notice" for r in TARGETS["rtx"].rules if r.severity == "error")
