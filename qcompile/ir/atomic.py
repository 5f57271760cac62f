"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: Path, *, sync: bool = True) -> Generator[BinaryIO, None, None]:
    """A file beside `path` to write to; on leaving it is flushed to the disk and renamed into place.

    Without `sync` it is not flushed: it survives the death of the process, but perhaps not that of the machine.

    Raises:
        OSError: the disk is full or the folder is not writable; nothing is left behind.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temp.open("wb") as f:
            yield f
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> Path:
    """Write `data` beside `path`, flush it to the disk, then rename it into place.

    Raises:
        OSError: the disk is full or the folder is not writable; nothing is left behind.
    """
    with atomic_file(path) as f:
        f.write(data.encode() if isinstance(data, str) else data)
    return path
