"""Arrays of an uncompressed .npz mapped from the file, so that calibration data does not sit in memory."""

from __future__ import annotations

import mmap
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

_LARGE = 1 << 20
_LOCAL_HEADER = 30


def mapped_array(path: Path, name: str) -> NDArray[Any] | None:
    """Member `name`.npy of `path`, mapped read-only; None where it is small, compressed or not in C order."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        info = archive.getinfo(f"{name}.npy")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size < _LARGE:
            return None
        file.seek(_data_offset(file, info.header_offset))
        shape, fortran, dtype = _header(file)
        if fortran or dtype.hasobject or int(np.prod(shape)) * dtype.itemsize < _LARGE:
            return None
        return np.memmap(path, dtype, mode="r", offset=file.tell(), shape=shape)


def forget(array: NDArray[Any]) -> None:
    """Let go of the pages that a mapped array has read; does nothing to other arrays."""
    mapping = getattr(array, "_mmap", None)
    if isinstance(mapping, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _data_offset(file: BinaryIO, header: int) -> int:
    file.seek(header)
    raw = file.read(_LOCAL_HEADER)
    name, extra = struct.unpack("<HH", raw[26:30])
    return header + _LOCAL_HEADER + name + extra


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)
