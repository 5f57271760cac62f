"""Weights that lie in a mapped file: read when they are touched, given back to the system when a step is done with them."""

from __future__ import annotations

import mmap
import weakref
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.tensors import named_tensors

_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


class MappedTensor(ir.Tensor):
    """A constant in the bytes of a file, at any offset."""

    __slots__ = ()

    def numpy(self) -> NDArray[Any]:
        """The array; a copy where the file does not align it (NumPy sums what is not aligned in another order)."""
        view = super().numpy()
        return view if view.flags.aligned else view.copy()


def map_file(path: Path) -> mmap.mmap:
    """The file's bytes.  Another file put in its place does not change them; cutting this one short does."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _maps.add(mapped)
    return mapped


def let_go(model: ir.Model) -> None:
    """Give the memory of mapped weights back; what is read again comes from the file."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    external = (t.raw for _, t in named_tensors(model) if isinstance(t, ir.ExternalTensor))
    for mapped in (*_maps, *(raw for raw in external if isinstance(raw, mmap.mmap))):
        mapped.madvise(mmap.MADV_DONTNEED)
