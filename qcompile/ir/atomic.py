"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import re
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import BinaryIO

import psutil

Check = Callable[[Path], None]
"""Looks at a file before it takes its name; raises what is wrong with it."""
_HEAD = 48  # characters of a name that its temporary file repeats: names are at most 255 bytes


@contextlib.contextmanager
def atomic_file(path: Path, *, sync: bool = True, check: Check | None = None) -> Generator[BinaryIO, None, None]:
    """A file beside `path` to write to; on leaving it is flushed to the disk, checked, and renamed into place.

    A link is written through.  Without `sync` it is not flushed: it survives the death of the process, but perhaps not that of
    the machine.  What dead processes left behind of the same file is removed.

    Raises:
        OSError: the disk is full, the folder is not writable, or `path` is a device, a pipe or a socket; nothing is left behind.
    """
    path = place(path)
    remove_stale(path)
    temp = beside(path)
    try:
        with temp.open("wb") as f:
            yield f
            f.flush()
            if sync:
                os.fsync(f.fileno())
        if check is not None:
            check(temp)
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def place(path: Path) -> Path:
    """Where `path` lies behind links.

    Raises:
        OSError: there is something that is neither a file nor a folder.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(0, "it is a device, a pipe or a socket, which would be replaced by a file")
    return path


def beside(path: Path) -> Path:
    """Where this process writes what will be `path`; of the same suffix."""
    return path.with_name(f"{_prefix(path)}{os.getpid()}.tmp{path.suffix[:_HEAD]}")


def remove_stale(path: Path) -> None:
    """Remove what dead processes of this machine left beside `path`."""
    head = _prefix(path)
    for stale in path.parent.glob(f"{glob.escape(head)}*.tmp*"):
        pid = stale.name.removeprefix(head).partition(".")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            stale.unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    host = re.sub(r"[^\w-]", "-", platform.node())[:_HEAD]
    name = path.name if len(path.name) <= _HEAD else f"{path.name[:_HEAD]}~{zlib.crc32(os.fsencode(path.name)):08x}"
    return f".{name}.{host}."


def write_atomic(path: Path, data: bytes | str, check: Check | None = None) -> Path:
    """Write `data` beside `path`, flush it to the disk, check it, then rename it into place.

    Raises as `atomic_file`.
    """
    with atomic_file(path, check=check) as f:
        f.write(data.encode() if isinstance(data, str) else data)
    return path
