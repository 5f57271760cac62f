"""README.md's tables name every pass, target and command that there is, and CHANGELOG the version."""

from __future__ import annotations

import re

from qcompile import __version__
from qcompile.cli.app import COMMANDS
from qcompile.pipeline.describe import describe_passes
from qcompile.target.catalog import TARGETS
from tests.docs.pages import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows(head: str) -> list[list[str]]:
    """The cells of the table under a head."""
    lines = README.partition(head)[2].splitlines()[2:]
    table = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def test_passes() -> None:
    assert rows("| pass | kind | what |") == [[f"`{p.name}`", p.kind, p.help] for p in describe_passes()]


def test_targets() -> None:
    shown = {name: schemes for name, _, schemes in rows("| target | for | schemes |")}
    assert {name.split("`")[1] for name in shown} == {*TARGETS}
    for name, schemes in shown.items():
        assert schemes == "the same" or {*re.findall(r"\w+\d+\w*", schemes)} == {*TARGETS[name.split("`")[1]].schemes}


def test_commands() -> None:
    named = " ".join(cells[0] for cells in rows("| command | does |"))
    assert {*COMMANDS} - {*re.findall(r"[a-z-]+", named)} == {"compile"}, "`qcompile MODEL` compiles"


def test_the_change_log_knows_the_version() -> None:
    assert __version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
