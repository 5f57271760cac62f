"""Weights of large models stay in files: what a pass rewrites goes to a scratch file that is mapped, not kept in memory.

The scratch folder lies in the temporary directory (`TMPDIR`: choose one on a disk where /tmp is kept in memory) and goes
when the process ends; a tensor's file goes as soon as nothing holds the tensor.
"""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.errors import ModelError
from qcompile.ir.tensors import data_chunks

LARGE_MODEL = 1 << 29
SPILLED_TENSOR = 1 << 18
_FLAG = "qcompile.large"
_ROOM = "qcompile.large.room"  # bytes of weights until then
_number = itertools.count()


class SpilledTensor(ir.ExternalTensor):
    """A constant in a scratch file of its own, mapped when it is read."""

    __slots__ = ()


def is_large(graph: ir.Graph) -> bool:
    """Whether the weights of `graph` are or once were `LARGE_MODEL` bytes and more; clones remember."""
    if not graph.meta.get(_FLAG) and _weight_bytes(graph) >= LARGE_MODEL:
        mark_large(graph)
    return bool(graph.meta.get(_FLAG))


def mark_large(graph: ir.Graph) -> None:
    """Treat `graph` and its clones as large: for parts of a large model."""
    graph.meta[_FLAG] = True


def constant_tensor(graph: ir.Graph, array: NDArray[Any], name: str, dtype: ir.DataType | None = None) -> ir.TensorProtocol:
    """A tensor for `graph`: spilled where the graph is large and the array not small."""
    tensor = ir.Tensor(array, dtype=dtype, name=name)
    return spilled(tensor) if tensor.nbytes >= SPILLED_TENSOR and _grown_large(graph, int(tensor.nbytes)) else tensor


def _grown_large(graph: ir.Graph, added: int) -> bool:
    """`is_large`, asked before each constant: the weights are counted anew only when what came since may have made it large."""
    room = graph.meta.get(_ROOM, 0) - added
    if room <= 0 and not is_large(graph):
        room = LARGE_MODEL - _weight_bytes(graph)
    graph.meta[_ROOM] = room
    return bool(graph.meta.get(_FLAG))


def spilled(tensor: ir.TensorProtocol) -> SpilledTensor:
    """`tensor` written to a scratch file.

    Raises:
        ModelError: no room in the temporary directory.
    """
    folder = scratch_folder()
    file = f"{next(_number)}.data"
    path = folder / file
    try:
        with path.open("wb") as f:
            f.writelines(data_chunks(tensor))
    except OSError as e:
        path.unlink(missing_ok=True)
        what = f"no room for rewritten weights in the temporary folder {folder} ({e.strerror})"
        raise ModelError(f"{what}; set TMPDIR to a place with more space") from e
    shape = ir.Shape(tensor.shape.numpy())
    made = SpilledTensor(file, 0, int(tensor.nbytes), tensor.dtype, shape=shape, name=str(tensor.name), base_dir=str(folder))
    weakref.finalize(made, _remove, str(path))
    return made


def scratch_folder() -> Path:
    """The process's folder for spilled data, made when it is first needed."""
    return Path(os.path.realpath(_scratch().name))


def hollow_file(size: int) -> Path:
    """A file of at least `size` zeros in the scratch folder; it takes no room on the disk."""
    path = scratch_folder() / "hollow"
    with path.open("ab") as file:
        if file.tell() < size:
            file.truncate(size)
    return path


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="qcompile-", ignore_cleanup_errors=True)


def _remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _weight_bytes(graph: ir.Graph) -> int:
    return sum(int(v.const_value.nbytes) for v in graph.initializers.values() if v.const_value is not None)
