"""Sessions on models of any size: a large model's weights stay in their files and are mapped by ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from qcompile.calib.data.readers import Arrays
from qcompile.errors import ModelError
from qcompile.execute.session import make_session, run
from qcompile.ir.cut import cut, part, typed
from qcompile.ir.model import Model
from qcompile.ir.spill import SPILLED_TENSOR, is_large, mark_large, scratch_folder, spilled
from qcompile.ir.tensors import external_tensors, map_tensors, placed

MAPPED: dict[str, Any] = {"arena": False, "extra": {"session.disable_prepacking": "1"}}
"""Options of `make_session` that leave weights in their files: packed copies of them would be anonymous memory."""


def open_session(model: Model, **options: Any) -> ort.InferenceSession:
    """`make_session` on a model in memory, with its options.

    The weights of a large model (`qcompile.ir.spill.is_large`) are neither serialized nor copied: the bytes point to the
    files they lie in.  Its session runs without graph optimizations (folding would make copies of weights) and without a
    memory arena, so that the process needs little memory beside the pages mapped from the files.

    Raises:
        ModelError: ONNX Runtime cannot load the model, or no room in the temporary directory.
    """
    if not is_large(model.graph):
        return make_session(model.to_proto().SerializeToString(), **options)
    return _mapped_session(model, options)


def simulate(model: Model, threads: int | None = None) -> ort.InferenceSession:
    """A session that computes Q/DQ pairs as they stand.

    ONNX Runtime 1.31 reads a Clip in front of fp8 codes as integer quantization even so; then without optimizations.

    Raises:
        ModelError: ONNX Runtime cannot load the model.
    """
    try:
        return open_session(model, qdq_fusion=False, threads=threads)
    except ModelError:
        return open_session(model, qdq_fusion=False, optimize="off", threads=threads)


def _mapped_session(model: Model, options: dict[str, Any]) -> ort.InferenceSession:
    copy = model.clone()
    LiftConstantsToInitializersPass()(copy.ir)
    map_tensors(copy.ir, _in_a_file)
    held = list(external_tensors(copy.ir))  # a spilled tensor's file goes with the tensor
    base = _common_folder(held)
    map_tensors(copy.ir, lambda t: placed(t, base) if isinstance(t, ir.ExternalTensor) else t)
    fixed: dict[str, Any] = {
        **MAPPED,
        "optimize": "off",
        "external_folder": base,
        "extra": {**MAPPED["extra"], **options.get("extra", {})},
    }
    session = make_session(ir.to_proto(copy.ir).SerializeToString(), **{**options, **fixed})
    del held
    return session


def _in_a_file(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return tensor if isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < SPILLED_TENSOR else spilled(tensor)


def _common_folder(tensors: Iterable[ir.ExternalTensor]) -> Path:
    """The folder that holds all files, however deep: ONNX Runtime reads nothing outside of the one it is given."""
    files = {os.path.realpath(t.path) for t in tensors}
    return Path(os.path.commonpath([os.path.dirname(f) for f in files] or [scratch_folder()]))


def run_in_parts(model: Model, feeds: Sequence[Arrays], limit: int, **options: Any) -> list[list[NDArray[Any]]]:
    """All outputs of `model` for every feed, from parts that read at most `limit` bytes of weights, one after the other.

    ONNX Runtime may dequantize the weights of a whole graph before it multiplies with the first: parts bound what that
    takes.  The values are those of one session without optimizations, bit for bit.  Raises as `open_session`.
    """
    source = typed(model)
    names = [str(v.name) for v in source.graph.outputs]
    blocks = cut(source, [(str(v.name),) for v in source.graph.outputs if v.producer() is not None], limit)
    known = [dict(feed) for feed in feeds]
    for i, block in enumerate(blocks):
        made = part(source, block)
        mark_large(made.graph)
        session = open_session(made, **options)
        inputs, outputs = ([v.name for v in values] for values in (session.get_inputs(), session.get_outputs()))
        for arrays in known:
            found = run(session, {n: arrays[n] for n in inputs}, outputs)
            arrays |= dict(zip(outputs, found, strict=True))
        _forget(known, {*names, *feeds[0], *(n for later in blocks[i + 1 :] for n in later.takes)})
    return [[arrays[n] for n in names] for arrays in known]


def _forget(known: Iterable[dict[str, NDArray[Any]]], needed: Collection[str]) -> None:
    for arrays in known:
        for name in arrays.keys() - needed:
            del arrays[name]
