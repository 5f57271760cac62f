from __future__ import annotations

import pytest

from qcompile.pipeline import registry
from tests.passes.goldens import Golden, goldens


@pytest.mark.parametrize("golden", goldens(), ids=lambda g: g.path.stem)
def test_golden(golden: Golden) -> None:
    """After a change that is meant: `python tools/update_goldens.py`, and read the difference."""
    assert golden.text() == golden.path.read_text(encoding="utf-8")


def test_every_pass_has_a_golden() -> None:
    shown = {p.name for g in goldens() for p in registry.parse(g.head["passes"])}
    assert not set(registry.names()) - shown, "write a file in tests/goldens; tests/passes/goldens.py shows one"
