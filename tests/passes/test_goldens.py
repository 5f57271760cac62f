from __future__ import annotations

import pytest

from qcompile.pipeline import registry
from tests.passes.goldens import FOLDER, GOLDENS, Golden


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda g: g.name)
def test_golden(golden: Golden) -> None:
    """After a change that is meant: `python tools/update_goldens.py`, and read the difference."""
    assert golden.text() == golden.path.read_text(encoding="utf-8")


def test_every_pass_has_a_golden() -> None:
    shown = {p.name for g in GOLDENS for p in registry.parse(g.passes)}
    missing = set(registry.names()) - shown
    assert not missing, "add a Golden to tests/passes/goldens.py"


def test_no_golden_is_left_over() -> None:
    assert {p.name for p in FOLDER.glob("*.txt")} == {g.path.name for g in GOLDENS}
