"""Sessions on models of any size: a large model's weights stay in their files and are mapped by ONNX Runtime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from qcompile.ir.model import Model
from qcompile.ir.spill import SPILLED_TENSOR, is_large, scratch_folder, spilled
from qcompile.ir.tensors import external_tensors, map_tensors, placed
from qcompile.runtime.session import make_session

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


def _mapped_session(model: Model, options: dict[str, Any]) -> ort.InferenceSession:
    copy = model.clone()
    LiftConstantsToInitializersPass()(copy.ir)
    map_tensors(copy.ir, _in_a_file)
    base = _common_folder(copy)
    map_tensors(copy.ir, lambda t: placed(t, base) if isinstance(t, ir.ExternalTensor) else t)
    fixed: dict[str, Any] = {
        **MAPPED,
        "optimize": "off",
        "external_folder": base,
        "extra": {**MAPPED["extra"], **options.get("extra", {})},
    }
    return make_session(ir.to_proto(copy.ir).SerializeToString(), **{**options, **fixed})


def _in_a_file(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return tensor if isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < SPILLED_TENSOR else spilled(tensor)


def _common_folder(model: Model) -> Path:
    """The folder that holds all files, however deep: ONNX Runtime reads nothing outside of the one it is given."""
    files = {os.path.realpath(t.path) for t in external_tensors(model.ir)}
    return Path(os.path.commonpath([os.path.dirname(f) for f in files] or [scratch_folder()]))
