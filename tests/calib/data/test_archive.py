"""Archives of arrays are read with distrust."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from qcompile.calib.data import load_data
from qcompile.calib.data.archive import read_array
from qcompile.errors import DataError
from qcompile.ir.model import InputInfo

X = [InputInfo("x", np.dtype(np.float32), ("N", 4))]


def stored(folder: Path, claimed: tuple[int, ...], data: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    """An archive whose array says that it has a shape, and holds `data`."""
    path = folder / "data.npz"
    with zipfile.ZipFile(path, "w", method) as archive, archive.open("x.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": claimed})
        member.write(data)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("claimed", [(1 << 40, 4), (500_000, 4), (2, 4), (-1, 4)])
def test_an_array_holds_what_its_header_says(tmp_path: Path, method: int, claimed: tuple[int, ...]) -> None:
    path = stored(tmp_path, claimed, bytes(4 * 4 * 400_000), method)
    with pytest.raises(DataError, match=r"array 'x' is damaged: by its header.*numpy.savez"):
        load_data(str(path), X)


def test_a_mapped_array_has_the_checksum_of_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.ones((100_000, 4), np.float32))
    assert isinstance(read_array(path, "x"), np.memmap)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"array 'x' is damaged \(its checksum"):
        load_data(str(path), X)


@pytest.mark.parametrize(("at", "value", "what"), [(6, 1, "is encrypted"), (8, 99, "unknown method")])
def test_what_python_cannot_unpack_is_said(tmp_path: Path, at: int, value: int, what: str) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.ones((8, 4), np.float32))
    raw = bytearray(path.read_bytes())
    raw[at] = raw[raw.index(b"PK\x01\x02") + at + 2] = value
    path.write_bytes(raw)
    with pytest.raises(DataError, match=what):
        load_data(str(path), X)


def test_no_more_is_unpacked_than_half_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=np.ones((100_000, 4), np.float32))
    assert len(load_data(str(path), X)) == 100_000
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": 1_000_000}))
    with pytest.raises(DataError, match=r"1,600,128 bytes unpacked.*not savez_compressed"):
        load_data(str(path), X)


def test_random_data_fits_the_memory() -> None:
    with pytest.raises(DataError, match="fewer --samples"):
        load_data("random", X, samples=10**14)


def test_labels_name_no_file_outside(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").touch()
    (folder / "labels.csv").write_text("file,label\n../a.png,1\n")
    inputs = [InputInfo("x", np.dtype(np.float32), ("N", 3, 8, 8))]
    with pytest.raises(DataError, match=r"names \.\./a\.png, which lies outside"):
        load_data(str(folder), inputs, "imagenet")
