"""docs/architecture.md says what tests/test_architecture.py holds, and the links and paths of all pages lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests.docs.pages import ROOT
from tests.test_architecture import FOR_ALL, MAY_IMPORT

DOCS = ROOT / "docs"
PAGES = [*DOCS.rglob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "models/README.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]*)#?([^)\s]*)\)")
PATH = re.compile(r"`((?:qcompile|passes|tests|tools|docs)/[\w./-]+)`")


def test_the_table_of_rooms_is_the_tested_one() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| ([^|]*) \|$", text, re.MULTILINE))
    wanted = {room: may for room, may in MAY_IMPORT.items() if room not in (*FOR_ALL, "__main__")}
    assert [*rows] == [*wanted]
    assert rows.pop("verbs") == "all of the above, passes only through the registry"
    assert {*MAY_IMPORT["verbs"]} == {*wanted} - {"passes", "verbs", "cli"}
    assert rows == {room: ", ".join(may) or "-" for room, may in wanted.items() if room != "verbs"}


def test_links_lead_to_pages_and_headings() -> None:
    assert not {f"{page.relative_to(ROOT)}: {link}" for page in PAGES for link in _broken(page)}


def _broken(page: Path) -> Iterator[str]:
    for target, heading in LINK.findall(page.read_text(encoding="utf-8")):
        path = page.parent / target if target else page
        if ":" not in target and (not path.exists() or (heading and heading not in _headings(path))):
            yield f"{target}#{heading}"


def _headings(page: Path) -> set[str]:
    """Headings as links spell them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_files_that_pages_name_are_there() -> None:
    named = {(page, path) for page in PAGES for text in [page.read_text(encoding="utf-8")] for path in PATH.findall(text)}
    gone = {f"{page.relative_to(ROOT)}: {path}" for page, path in named if not (ROOT / path).exists()}
    assert not {g for g in gone if not re.search(r"merge_factor|even\.py|/NAME/", g)}, "or is it an example?"
