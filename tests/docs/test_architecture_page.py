"""docs/architecture.md says what tests/test_architecture.py holds, and links and paths on the pages of the house are there."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import ROOT
from tests.test_architecture import FOR_ALL, MAY_IMPORT

DOCS = ROOT / "docs"
HOUSE = [
    "architecture.md",
    "glossary.md",
    "guide/own-passes.md",
    "guide/own-targets.md",
    *(f"adr/{p.name}" for p in DOCS.glob("adr/*")),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
PATH = re.compile(r"`((?:qcompile|passes|tests|tools|docs)/[\w./-]+)`")


def test_the_table_of_rooms_is_the_tested_one() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| ([^|]*) \|$", text, re.MULTILINE))
    wanted = {room: may for room, may in MAY_IMPORT.items() if room not in (*FOR_ALL, "__main__")}
    assert [*rows] == [*wanted]
    assert rows.pop("verbs") == "all of the above, passes only through the registry"
    assert {*MAY_IMPORT["verbs"]} == {*wanted} - {"passes", "verbs", "cli"}
    assert rows == {room: ", ".join(may) or "-" for room, may in wanted.items() if room != "verbs"}


@pytest.mark.parametrize("page", HOUSE)
def test_links_and_paths_exist(page: str) -> None:
    path = DOCS / page
    text = path.read_text(encoding="utf-8")
    targets = [path.parent / t for t in LINK.findall(text) if "://" not in t]
    targets += [ROOT / t for t in PATH.findall(text) if t not in _examples(text)]
    assert not [str(t) for t in targets if not t.exists()]


def _examples(text: str) -> set[str]:
    """Paths of files that the page asks its reader to make."""
    return {p for p in PATH.findall(text) if re.search(r"merge_factor|even\.py|/NAME/", p)}
