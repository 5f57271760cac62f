"""docs/guide/own-passes.md: its passes work as it says, installed as another package's."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcompile.pipeline import registry
from tests.docs.pages import ROOT, Page, run, shows
from tests.passes.goldens import Golden

PAGE = Page(ROOT / "docs" / "guide" / "own-passes.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("package")
    PAGE.install(made)
    return made


def test_the_page_shows_a_package() -> None:
    assert [*PAGE.files()] == ["merge_factor.py", "even.py", "pyproject.toml", "test_even.py"]


@pytest.mark.parametrize(("command", "output"), PAGE.transcripts(), ids=lambda text: text[:40])
def test_commands_print_what_the_page_shows(command: str, output: str, folder: Path) -> None:
    printed = run(command, folder, code=0)
    assert shows(output, printed), printed


def test_the_tests_of_the_page_pass(folder: Path) -> None:
    assert "2 passed" in run("python -m pytest -q -p no:cacheprovider -n 0 test_even.py", folder, code=0)


def test_the_golden_is_what_the_pass_makes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    caches = (registry._entry_points, registry.forms)
    for c in caches:
        c.cache_clear()
    (shown,) = PAGE.blocks("text")
    (folder / "merge-factor.txt").write_text(shown, encoding="utf-8")
    assert Golden(folder / "merge-factor.txt").text() == shown
    monkeypatch.undo()
    for c in caches:
        c.cache_clear()
