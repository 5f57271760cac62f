"""docs/guide/own-targets.md: its target works as it says, installed as another package's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Page, run, shows

PAGE = Page(ROOT / "docs" / "guide" / "own-targets.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("target")
    PAGE.install(made)
    return made


def test_a_target_is_one_folder(folder: Path) -> None:
    assert [*PAGE.files()] == ["dsp/target.py", "dsp/placement.py", "dsp/rules.py", "pyproject.toml"]


def test_commands_print_what_the_page_shows(folder: Path) -> None:
    for command, output in PAGE.transcripts():
        printed = run(command, folder)
        assert shows(output, printed), printed
