"""Running a model is one room: `open_model` is the way from a `Model` to a session.

The session reads the weights where the model holds them, in memory or in mapped files: neither serialized nor copied.
What ONNX Runtime does not take as a value (strings, 4-bit and small-float codes, weights inside bodies) travels in the
serialized graph; a large model's go to a file.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from qcompile.errors import ModelError
from qcompile.execute.emulate.runnable import runnable
from qcompile.execute.session import make_session, run
from qcompile.ir.cut import cut, part, typed
from qcompile.ir.mapped import let_go
from qcompile.ir.model import Model
from qcompile.ir.spill import SPILLED_TENSOR, hollow_file, is_large, mark_large, scratch_folder, spilled
from qcompile.ir.tensors import elsewhere, external_tensors, map_tensors, placed, stored_array
from qcompile.ir.widen import widen

Arrays = dict[str, NDArray[Any]]

SHARED_TENSOR = 1 << 14  # shape inference reads no shape that is as long
_SHARED_TYPES = frozenset({
    ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32,
    ir.DataType.INT64, ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64, ir.DataType.BOOL,
})  # fmt: skip


def open_model(model: Model, *, exact: bool = False, **options: Any) -> ort.InferenceSession:
    """A session that computes `model` with its Q/DQ pairs as they stand; formats that ONNX Runtime lacks are emulated.

    Args:
        exact: every operator as it is written, without optimizations; kernels read the weights in place (they pack no copies, so
            that last bits differ from a session that is not exact: compare like with like).
        options: `threads`, `use`, `arena` and `extra` of `qcompile.execute.session.make_session`.

    A large model (`qcompile.ir.spill.is_large`) always runs exactly, without a memory arena.  Where ONNX Runtime cannot optimize
    a graph, it runs exactly too; where it has no kernel for float16 or float64 ones, in float32.

    Raises:
        ModelError: ONNX Runtime cannot load the model, or no room in the temporary directory.
    """
    try:
        return _opened(runnable(model), exact, options)
    except ModelError:
        twin = model.clone()
        if not widen(twin):
            raise
    return _opened(runnable(twin), exact, options)


def _opened(ready: Model, exact: bool, options: dict[str, Any]) -> ort.InferenceSession:
    if is_large(ready.graph):
        return _exact(ready, {**options, "arena": False})
    if exact:
        return _exact(ready, options)
    try:
        session = _shared(ready, options)
    except ModelError:
        return _exact(ready, options)
    let_go(ready.ir)  # kernels have packed copies
    return session


def _exact(model: Model, options: dict[str, Any]) -> ort.InferenceSession:
    return _shared(model, {**options, "optimize": "off", "packed": False})


def _shared(model: Model, options: dict[str, Any]) -> ort.InferenceSession:
    return _mapped(model, options) if is_large(model.graph) else _open(model, options)


def _mapped(model: Model, options: dict[str, Any]) -> ort.InferenceSession:
    """Of a large model: what cannot be handed in lies in files."""
    copy = model.clone()
    LiftConstantsToInitializersPass()(copy.ir)
    held, folder = _in_files(copy)
    session = _open(copy, options, folder)
    del held  # a spilled tensor's file goes with the tensor
    return session


def _open(model: Model, options: dict[str, Any], folder: Path | None = None) -> ort.InferenceSession:
    folder = folder or scratch_folder()
    with _taken(model.graph, folder) as weights:
        data = ir.to_proto(model.ir).SerializeToString()
    return make_session(data, weights=weights, qdq_fusion=False, reuse=False, external_folder=folder, **options)


@contextmanager
def _taken(graph: ir.Graph, folder: Path) -> Generator[Arrays]:
    """The weights that a session can read where they are; meanwhile the graph holds only their names, types and shapes, and for
    data a file of zeros in `folder` that takes no room: ONNX Runtime wants to see one, and reads it where nothing else is given.
    """
    values = [v for v in graph.initializers.values() if _can_be_shared(v.const_value)]
    tensors = [t for v in values if (t := v.const_value) is not None]
    location = hollow_file(max((int(t.nbytes) for t in tensors), default=0)).relative_to(folder).as_posix()
    with elsewhere(values, location):
        yield {str(v.name): stored_array(t) for v, t in zip(values, tensors, strict=True)}


def _can_be_shared(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and is_shared(tensor)


def is_shared(tensor: ir.TensorProtocol) -> bool:
    """Whether a session reads the tensor where it is; others travel in the serialized graph."""
    return tensor.nbytes >= SHARED_TENSOR and tensor.dtype in _SHARED_TYPES


def _in_files(copy: Model) -> tuple[list[ir.ExternalTensor], Path | None]:
    """The large tensors that cannot be shared, each in a file, and the folder that holds them all."""

    def in_a_file(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        small = tensor.nbytes < SPILLED_TENSOR or _can_be_shared(tensor)
        return tensor if isinstance(tensor, ir.ExternalTensor) or small else spilled(tensor)

    map_tensors(copy.ir, in_a_file)
    held = list(external_tensors(copy.ir))
    if not held:
        return [], None
    base = _common_folder(held)
    map_tensors(copy.ir, lambda t: placed(t, base) if isinstance(t, ir.ExternalTensor) else t)
    return held, base


def _common_folder(tensors: Iterable[ir.ExternalTensor]) -> Path:
    """The folder that holds all files, however deep: ONNX Runtime reads nothing outside of the one it is given."""
    files = {os.path.realpath(t.path) for t in tensors}
    return Path(os.path.commonpath([scratch_folder(), *(os.path.dirname(f) for f in files)]))


def run_in_parts(model: Model, feeds: Sequence[Arrays], limit: int, **options: Any) -> list[list[NDArray[Any]]]:
    """All outputs of `model` for every feed, from parts that read at most `limit` bytes of weights, one after the other.

    Without feeds, the parts are only opened.  ONNX Runtime may dequantize the weights of a whole graph before it multiplies with
    the first: parts bound what that takes.  The values are those of one exact session, bit for bit.  Raises as `open_model`.
    """
    source = typed(model)
    names = [str(v.name) for v in source.graph.outputs]
    blocks = cut(source, [(str(v.name),) for v in source.graph.outputs if v.producer() is not None], limit)
    known = [dict(feed) for feed in feeds]
    for i, block in enumerate(blocks):
        made = part(source, block)
        mark_large(made.graph)
        session = open_model(made, exact=True, **options)
        inputs, outputs = ([v.name for v in values] for values in (session.get_inputs(), session.get_outputs()))
        for arrays in known:
            found = run(session, {n: arrays[n] for n in inputs}, outputs)
            arrays |= dict(zip(outputs, found, strict=True))
        _forget(known, {*names, *(feeds[0] if feeds else ()), *(n for later in blocks[i + 1 :] for n in later.takes)})
    return [[arrays[n] for n in names] for arrays in known]


def _forget(known: Iterable[Arrays], needed: Collection[str]) -> None:
    for arrays in known:
        for name in arrays.keys() - needed:
            del arrays[name]
