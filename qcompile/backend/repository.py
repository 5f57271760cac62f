"""A Triton model repository on disk: a model is staged beside it and appears by a rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qcompile.backend.triton import CONFIG, HEADER, WARMUP
from qcompile.errors import BackendError, UsageError


@contextmanager
def staging(repository: Path, name: str) -> Generator[Path]:
    """An empty folder for `name` on the repository's file system, removed afterwards.

    It lies outside the repository where that is possible: a polling server takes every folder inside for a model.

    Raises:
        UsageError: the folder that holds the repository does not exist.
        BackendError: nothing can be written there.
    """
    if not repository.parent.is_dir():
        raise UsageError(f"the folder of the repository {repository} does not exist; create it first, or choose another place")
    try:
        repository.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=_scratch(repository)) as scratch:
            staged = Path(scratch) / name
            staged.mkdir()
            yield staged
    except OSError as error:
        raise BackendError(
            f"cannot write the repository {repository}: {error.strerror or error}; free space or choose another folder"
        ) from error


def _scratch(repository: Path) -> Path:
    outside = repository.resolve().parent
    same = outside.stat().st_dev == repository.stat().st_dev
    return outside if same and os.access(outside, os.W_OK) else repository


def write_staged(staged: Path, contents: Mapping[str, bytes | Path]) -> None:
    """Write {relative path: bytes, or a file to copy} below `staged`, flushed to the disk."""
    for relative, content in contents.items():
        path = staged / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            path.write_bytes(content)
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def require_room(repository: Path, name: str, version: int, interface: str, replace: bool) -> None:
    """Refuse to harm what is served already.

    `interface` is the text of the new config's interface fields.

    Raises:
        UsageError: the version exists; the config is someone's own; or other versions have another interface.
    """
    folder, config = repository / name, repository / name / CONFIG
    if replace or not folder.exists():
        return
    if (folder / str(version)).exists():
        raise UsageError(f"{folder} has a version {version}; add --replace, or choose another --version or --name")
    held = config.read_text(encoding="utf-8") if config.is_file() else ""
    if not held.startswith(HEADER):
        raise UsageError(f"{config} was not written by qcompile deploy and would be overwritten; add --replace, or choose --name")
    if interface not in held:
        raise UsageError(f"the versions in {folder} have other inputs, outputs or batch size; choose --name, or add --replace")


def publish(staged: Path, repository: Path, version: int) -> Path:
    """Move the staged model into the repository; returns its folder.

    A new model is one rename.  Into an existing one go the warm-up files and labels, then the version, and the config
    last, so that a server never sees a config without its files.
    """
    final = repository / staged.name
    if not final.exists():
        os.rename(staged, final)
        return final
    aside = staged.parent / "replaced"
    for file in sorted(
        p for p in staged.rglob("*") if p.is_file() and p.relative_to(staged).parts[0] not in (CONFIG, str(version))
    ):
        place = final / file.relative_to(staged)
        place.parent.mkdir(exist_ok=True)
        os.replace(file, place)
    if (final / str(version)).exists():
        os.rename(final / str(version), aside)
    os.rename(staged / str(version), final / str(version))
    os.replace(staged / CONFIG, final / CONFIG)
    return final


def tree(folder: Path) -> list[str]:
    """The files below `folder`, relative to its parent, sorted; other versions than the served one included."""
    return sorted(str(p.relative_to(folder.parent)) for p in folder.rglob("*") if p.is_file())


def warmup_file(version: int, index: int) -> str:
    """Its name in the folder `warmup`: by version, so that a new version never changes the sample of another."""
    return f"v{version}-{index}.raw"


def warmup_path(version: int, index: int) -> str:
    """Relative to the model's folder."""
    return f"{WARMUP}/{warmup_file(version, index)}"
