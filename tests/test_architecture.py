"""Who may import whom (the table of the design), file sizes, and where `passes/` lives."""

from __future__ import annotations

import ast
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EVERYONE = ("errors", "report")
PACKAGE = ""  # qcompile itself, for its __version__
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "report": (),
    "quant": (),
    "ir": ("quant.spec", "quant.qtype"),
    "runtime": (),
    "calib": ("ir", "quant", "runtime"),
    "oracle": (),
    "target": ("quant", "ir.ops", "oracle"),
    "pipeline": ("ir", "quant.spec", "calib.observers", "target"),
    "passes": ("ir", "quant", "pipeline.base", "calib.observers", "target"),
    "backend": ("ir", "target", "runtime"),
    "emulate": ("ir", "quant"),
    "providers": ("ir", "runtime", "calib", "emulate", "pipeline.base"),  # what the runner is injected with
    "layers": ("ir", "runtime", "calib", "emulate"),
    "evaluate": ("ir", "runtime", "calib", "emulate", "layers"),
    "benchmark": ("ir", "runtime", "calib", "emulate"),
    "engine_bench": ("backend", "emulate", "ir", "runtime"),
    "conformance": ("calib", "oracle", "runtime"),  # the integer oracle against ONNX Runtime
    "integer_export": ("ir", "oracle"),
    "guards": ("ir",),
    "job": ("ir", "quant", "calib", "target", "pipeline", "guards"),
    "calibration": ("job", "ir", "calib", "providers", "runtime"),
    "calibrate": ("calibration", "job", "ir", "runtime", "calib", "emulate", "pipeline", PACKAGE),
    "compile": ("calibration", "job", "ir", "quant", "runtime", "calib", "target", "pipeline", "backend", "guards", PACKAGE),
    "__main__": ("cli",),
    "engine": ("backend", "target"),
    "checking": ("ir", "oracle", "target", PACKAGE),
    "inspection": ("ir", "backend", "oracle", "target"),
    "parity": ("backend", "calib", "runtime"),
    "deploy": ("backend", "calib", "ir", "parity", "runtime", "target"),
    "cli": (
        *("calibrate", "compile", "evaluate", "benchmark", "deploy", "engine", "engine_bench", "inspection", "guards", PACKAGE),
        *(
            "pipeline.registry",
            "pipeline.describe",
            "target.rules",
            "target.findings",
            "checking",
            "conformance",
            "integer_export",
            "oracle",
            "ir.model",
        ),
        *("calib.data", "calib.checks"),
    ),
}
HEAVY = {"tensorrt": "backend", "tensorrt_rtx": "backend", "polygraphy": "backend", "click": "cli"}
THIRD_PARTY_ALLOWED = {"polygraphy": ("backend", "calib")}


def _sources() -> list[Path]:
    ours = [p for p in (ROOT / "qcompile").rglob("*.py") if "passes" not in p.relative_to(ROOT / "qcompile").parts]
    return sorted([*ours, *(ROOT / "passes").rglob("*.py")])


def _room(path: Path) -> str:
    """The first part of the module's name below qcompile: ir, passes, cli ..."""
    parts = path.relative_to(ROOT).parts
    return "passes" if parts[0] == "passes" else parts[1].removesuffix(".py")


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def _imports(path: Path) -> Iterator[str]:
    """Full names of the modules that `path` imports anywhere, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inner if node.module is not None and _is_module(name)]
            yield from modules or [str(node.module)]


def _allowed(room: str, target: str) -> bool:
    choices = (*EVERYONE, *MAY_IMPORT[room])
    return any(target == c or target.startswith(f"{c}.") for c in choices)


def _inside_own_room(room: str, target: str) -> bool:
    own = target == room or target.startswith(f"{room}.")
    return own and (room != "passes" or target.split(".")[-1].startswith("_"))


SOURCES = _sources()
IDS = [str(p.relative_to(ROOT)) for p in SOURCES]


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_imports_point_the_right_way(path: Path) -> None:
    room = _room(path)
    if room == "__init__":
        return
    assert room in MAY_IMPORT, f"{room} is not in the table of the design: add it there and in MAY_IMPORT"
    for name in _imports(path):
        if name.split(".")[0] == "qcompile":
            target = name.removeprefix("qcompile").removeprefix(".")
            assert _inside_own_room(room, target) or _allowed(room, target), f"{room} must not import {name}"


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_heavy_packages_stay_in_their_room(path: Path) -> None:
    for name in _imports(path):
        top = name.split(".")[0]
        if top in HEAVY:
            assert _room(path) in THIRD_PARTY_ALLOWED.get(top, (HEAVY[top],)), f"only {HEAVY[top]} may import {top}"
        assert top != "passes", "import qcompile.passes, never the top-level folder"


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_files_are_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 400


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_nothing_evaluates_or_unpickles(path: Path) -> None:
    calls = [n.func.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert not {"eval", "exec"} & set(calls)
    assert not any(name.split(".")[0] in ("pickle", "dill", "joblib") for name in _imports(path))


def test_the_passes_folder_is_the_package_qcompile_passes() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["package-dir"]["qcompile.passes"] == "passes"
    assert "qcompile.passes" in setuptools["packages"]
    assert all(name.split(".")[0] == "qcompile" for name in setuptools["packages"]), "no top-level `passes` in a wheel"
    link = ROOT / "qcompile" / "passes"
    assert link.is_symlink() and os.readlink(link) == "../passes"


def test_every_package_of_the_tree_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "qcompile").rglob("__init__.py")} | {"qcompile.passes"}
    assert found == set(listed)


def test_lint_bans_the_top_level_name() -> None:
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "TID" in lint["select"] and "passes" in lint["flake8-tidy-imports"]["banned-api"]
