"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import BinaryIO

Check = Callable[[Path], None]
"""Looks at a file before it takes its name; raises what is wrong with it."""


@contextlib.contextmanager
def atomic_file(path: Path, *, sync: bool = True, check: Check | None = None) -> Generator[BinaryIO, None, None]:
    """A file beside `path` to write to; on leaving it is flushed to the disk, checked, and renamed into place.

    Without `sync` it is not flushed: it survives the death of the process, but perhaps not that of the machine.

    Raises:
        OSError: the disk is full or the folder is not writable; nothing is left behind.
    """
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


def beside(path: Path) -> Path:
    """Where this process writes what will be `path`; of the same suffix."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")


def write_atomic(path: Path, data: bytes | str, check: Check | None = None) -> Path:
    """Write `data` beside `path`, flush it to the disk, check it, then rename it into place.

    Raises:
        OSError: the disk is full or the folder is not writable; nothing is left behind.
    """
    with atomic_file(path, check=check) as f:
        f.write(data.encode() if isinstance(data, str) else data)
    return path
