"""What a wheel and an sdist hold: every module under the one name `qcompile`, whatever folder is added (ADR 002)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from functools import cache
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.modules import ROOT, sources


def build(tree: Path, out: Path, kind: str) -> Path:
    """The one file that the build backend writes, without a network and without pip."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    """The wheel's files without its own records."""
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        assert len(names) == len(set(names)), "a file stands in the wheel twice"
        return {n: archive.read(n) for n in names if ".dist-info/" not in n}


@cache
def expected() -> dict[str, bytes]:
    """Every module of the tree under its path in a wheel, and the mark that types are there."""
    tree = {(Path("qcompile") / s.path if s.path.parts[0] == "passes" else s.path): ROOT / s.path for s in sources().values()}
    return {p.as_posix(): file.read_bytes() for p, file in tree.items()} | {"qcompile/py.typed": b""}


def test_a_wheel_holds_every_module_once_and_no_top_level_passes(tmp_path: Path) -> None:
    assert contents(build(ROOT, tmp_path, "wheel")) == expected()


def test_a_wheel_of_the_sdist_is_the_wheel_of_the_tree(tmp_path: Path) -> None:
    with tarfile.open(build(ROOT, tmp_path / "sdist", "sdist")) as archive:
        assert not [m.name for m in archive.getmembers() if m.issym() or m.islnk()]
        archive.extractall(tmp_path / "tree", filter="data")
    (tree,) = (tmp_path / "tree").iterdir()
    assert contents(build(tree, tmp_path / "wheel", "wheel")) == expected()


@pytest.mark.parametrize("link", ["file", "none"])
def test_a_wheel_needs_no_symlink(tmp_path: Path, link: str) -> None:
    """git on Windows checks `qcompile/passes` out as a text file."""
    tree = tmp_path / "tree"
    for folder in ("qcompile", "passes"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    (tree / "qcompile" / "passes").unlink()
    if link == "file":
        (tree / "qcompile" / "passes").write_text("../passes")
    assert contents(build(tree, tmp_path / "wheel", "wheel")) == expected()


def test_the_passes_folder_is_reached_under_one_name() -> None:
    link = ROOT / "qcompile" / "passes"
    assert link.is_symlink() and os.readlink(link) == "../passes"
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "TID" in lint["select"] and "passes" in lint["flake8-tidy-imports"]["banned-api"]
