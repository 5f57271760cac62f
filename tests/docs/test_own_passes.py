"""docs/guide/own-passes.md: its passes work as it says, installed as another package's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Page, run, shows

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


def test_the_golden_is_what_the_pass_makes(folder: Path) -> None:
    (shown,) = PAGE.blocks("text")
    (folder / "golden.txt").write_text(shown, encoding="utf-8")
    program = "from pathlib import Path; from tests.passes.goldens import Golden; print(Golden(Path('golden.txt')).text())"
    assert run(f'python -c "{program}"', folder, code=0) == shown.strip()
