"""Arrays of a .npz, read with distrust: uncompressed ones are mapped, so that calibration data does not sit in memory."""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import psutil
from numpy.typing import NDArray

from qcompile.errors import DataError

_LARGE = 1 << 20
_LOCAL_HEADER = 30
_PIECE = 1 << 24
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
_ENCRYPTED = 1


def read_array(path: Path, name: str) -> NDArray[Any]:
    """Member `name`.npy of `path`; mapped read-only where it is large and neither compressed nor in Fortran order.

    Raises:
        DataError: it is encrypted, longer or shorter than it says, damaged, or too large to be unpacked into memory.
        ValueError: it is no array, or holds Python objects.
    """
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{name}.npy")
        _require_readable(info, path, name)
        with archive.open(info) as member:
            shape, fortran, dtype = _header(member)
            if dtype.hasobject:
                raise ValueError("Object arrays cannot be read")
            _require_length(info, member.tell(), shape, dtype, path, name)
            start = member.tell()
        if info.compress_type == zipfile.ZIP_STORED and not fortran and info.file_size - start >= _LARGE:
            return _mapped(path, name, info, start, shape, dtype)
        what = f"{path}: array {name!r} has {info.file_size:,} bytes unpacked"
        require_room(info.file_size, what, "save it with numpy.savez, not savez_compressed: then it is read piece by piece")
        with archive.open(info) as member:
            return np.lib.format.read_array(member, allow_pickle=False)


def forget(array: NDArray[Any]) -> None:
    """Let go of the pages that a mapped array has read; does nothing to other arrays."""
    mapping = getattr(array, "_mmap", None)
    if isinstance(mapping, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


def _require_readable(info: zipfile.ZipInfo, path: Path, name: str) -> None:
    if info.flag_bits & _ENCRYPTED:
        raise DataError(f"{path}: array {name!r} is encrypted; unpack the archive with its password and pack it again without")
    if info.compress_type not in _METHODS:
        raise DataError(f"{path}: array {name!r} is packed by an unknown method ({info.compress_type}); save it with numpy.savez")


def _require_length(
    info: zipfile.ZipInfo, header: int, shape: tuple[int, ...], dtype: np.dtype[Any], path: Path, name: str
) -> None:
    count = dtype.itemsize
    for d in shape:
        count *= d
    if count != info.file_size - header:
        what = f"{path}: array {name!r} is damaged: by its header {list(shape)} it has {count:,} bytes"
        raise DataError(f"{what}, the file holds {info.file_size - header:,}; save it again with numpy.savez")


def require_room(size: int, what: str, way: str) -> None:
    """What sits in memory whole may take half of it.

    Raises:
        DataError: `what` takes more; `way` says how to go on.
    """
    most = psutil.virtual_memory().total // 2
    if size > most:
        raise DataError(f"{what}, more than half of this machine's memory ({most:,}); {way}")


def _mapped(
    path: Path, name: str, info: zipfile.ZipInfo, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> NDArray[Any]:
    with path.open("rb") as file:
        offset = _data_offset(file, info.header_offset)
        if _checksum(file, offset, info.file_size) != info.CRC:
            raise DataError(f"{path}: array {name!r} is damaged (its checksum is wrong); copy or save the file again")
    return np.memmap(path, dtype, mode="r", offset=offset + start, shape=shape)


def _checksum(file: BinaryIO, offset: int, length: int) -> int:
    file.seek(offset)
    found = 0
    while length > 0 and (piece := file.read(min(_PIECE, length))):
        found, length = zlib.crc32(piece, found), length - len(piece)
    return found


def _data_offset(file: BinaryIO, header: int) -> int:
    file.seek(header)
    raw = file.read(_LOCAL_HEADER)
    name, extra = struct.unpack("<HH", raw[26:30])
    return header + _LOCAL_HEADER + name + extra


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)
