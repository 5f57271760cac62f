"""ONNX files are opened here and nowhere else: with distrust, as protobuf or as onnx_ir, large weights mapped where they lie."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from onnx_ir.external_data import set_base_dir

from qcompile.errors import ModelError
from qcompile.ir.accept import in_order, spell_out
from qcompile.ir.mapped import MappedTensor, map_file
from qcompile.ir.skim import Found, skim
from qcompile.ir.sound import bodies, require_sound, stored_bytes
from qcompile.ir.tensors import map_tensors

MAPPED_FILE = 1 << 26  # from here on a file's weights are mapped: a smaller one is read
SKIMMED_FILE = 1 << 20  # from here on a protobuf parser's copies of weights are saved


def read_proto(path: str | Path, *, weights: bool = True) -> ModelProto:
    """The model at `path` as protobuf.

    Args:
        weights: read external data in, else leave it where it is (it is looked at all the same).

    Raises:
        ModelError: no such file, not ONNX, external data missing, truncated or outside the model's folder.
    """
    path = Path(path)
    proto = _checked(_parsed(path), path)
    for tensor in _tensors(proto) if weights else ():
        if tensor.data_location == TensorProto.EXTERNAL:
            _read_in(tensor, path.parent)
    return proto


def _read_in(tensor: TensorProto, folder: Path) -> None:
    file, start, length = _where(tensor, folder)
    with file.open("rb") as stream:
        stream.seek(start)
        data = stream.read(length)
    tensor.ClearField("external_data")
    tensor.data_location = TensorProto.DEFAULT
    tensor.raw_data = data


def _where(tensor: TensorProto, folder: Path) -> tuple[Path, int, int]:
    """File, first byte and number of bytes of a checked tensor."""
    info = {e.key: e.value for e in tensor.external_data}
    return folder / info["location"], int(info.get("offset") or 0), int(info.get("length") or 0) or stored_bytes(tensor)


def read_ir(path: str | Path) -> ir.Model:
    """The model at `path`; external data and the weights of a file from 64 MiB on are mapped, not read.

    Raises as `read_proto`.
    """
    path = Path(path)
    proto, found = _hollow(path)
    model = as_ir(proto, path)
    if found is not None:
        _put_back(model.graph, found)
    return model


def file_bytes(path: str | Path) -> int:
    """What a model takes on disk: its file and the external data files that it names.

    Raises as `read_proto`.
    """
    path = Path(path)
    proto, _ = _hollow(path)
    named = {e.value for t in _tensors(proto) for e in t.external_data if e.key == "location"}
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in named)


def as_ir(proto: ModelProto, path: Path) -> ir.Model:
    """`proto`, which was read from `path`.

    Raises:
        ModelError: onnx_ir cannot read it.
    """
    spell_out(proto, path)
    try:
        model = ir.from_proto(proto)
    except Exception as e:  # onnx_ir's errors share no base
        raise ModelError(f"{path} cannot be read: {_root(e)}; does onnx.checker accept it? Export the model again") from e
    in_order(model.graph, path)
    set_base_dir(model.graph, path.parent)
    map_tensors(model, _followed)
    return model


def _followed(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """onnx_ir reads no data through links: those that `_check_external` let pass are mapped here."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    file = Path(tensor.path)
    if file.stat().st_nlink == 1 and not file.is_symlink():
        return tensor
    shape, start, data = tensor.shape.numpy(), tensor.offset or 0, map_file(file)
    if tensor.dtype.bitwidth < 8:  # packed
        raw = data[start : start + int(tensor.nbytes)]
        return ir.from_proto(TensorProto(name=tensor.name, data_type=int(tensor.dtype), dims=shape, raw_data=raw))
    array = np.frombuffer(data, tensor.dtype.numpy(), math.prod(shape), start).reshape(shape)
    return MappedTensor(array, tensor.dtype, shape=ir.Shape(shape), name=str(tensor.name), doc_string=tensor.doc_string)


def _root(error: BaseException) -> str:
    """The first line of what went wrong at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(". ") if lines else type(error).__name__


def _hollow(path: Path) -> tuple[ModelProto, Found | None]:
    """The model without its large weights, and these; or, where they cannot be taken apart, as it is."""
    found = _skimmed(path)
    return _checked(_parsed(path) if found is None else _decoded(found.rest, path), path), found


def _skimmed(path: Path) -> Found | None:
    """The file without its large weights; None where it is tiny, or not as simple as exporters write it."""
    _require_file(path)
    size = path.stat().st_size
    if path.suffix != ".onnx" or size < SKIMMED_FILE:
        return None
    try:
        return skim(map_file(path) if size >= MAPPED_FILE else path.read_bytes())
    except ValueError:  # the ordinary parser says what is wrong
        return None


def _put_back(graph: ir.Graph, found: Found) -> None:
    for tensor in found.tensors:
        value = graph.initializers[tensor.name]
        old = value.const_value
        assert old is not None
        shape = ir.Shape(old.shape.numpy())
        value.const_value = MappedTensor(tensor.array, old.dtype, shape=shape, name=tensor.name, doc_string=old.doc_string)


def _parsed(path: Path) -> ModelProto:
    _require_file(path)
    try:
        return onnx.load(str(path), load_external_data=False)
    except OSError as e:
        raise ModelError(f"cannot read {path}: {e.strerror or e}; give the path of an ONNX file") from e
    except Exception as e:  # as many classes as formats
        raise _unreadable(path, e) from e


def _decoded(data: bytes, path: Path) -> ModelProto:
    try:
        return ModelProto.FromString(data)
    except DecodeError as e:
        raise _unreadable(path, e) from e


_TORCH, _TF = ("a PyTorch file", "export it with torch.onnx.export"), ("a TensorFlow or Keras model", "convert it with tf2onnx")
_BUILT = ("an engine", "give the ONNX file that it was built from")
_OTHERS = {
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".safetensors"), _TORCH),
    **dict.fromkeys((".tflite", ".pb", ".h5", ".keras"), _TF),
    **dict.fromkeys((".engine", ".plan", ".trt"), _BUILT),
}


def _require_file(path: Path) -> None:
    if path.is_dir():
        inside = next(iter(sorted(p.name for p in path.glob("*.onnx"))), "model.onnx")
        raise ModelError(f"{path} is a folder; name the ONNX file in it, e.g. {path / inside}")
    if not path.is_file():
        raise ModelError(f"no model at {path}: check the path")


def _unreadable(path: Path, error: Exception) -> ModelError:
    if path.suffix.lower() in _OTHERS:
        kind, way = _OTHERS[path.suffix.lower()]
        return ModelError(f"{path} is {kind}, not an ONNX model; {way}")
    what = f"{path} is not a readable ONNX model ({type(error).__name__})"
    return ModelError(f"{what}; is the file complete? Try: polygraphy inspect model")


def _checked(proto: ModelProto, path: Path) -> ModelProto:
    if not proto.opset_import:
        raise ModelError(f"{path} is not an ONNX model (it names no operator set); export the model again")
    roots = (path.parent.resolve(), path.resolve().parent)  # where the path leads to through links of the user's own
    for tensor in _tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            _check_external(tensor, path, roots)
    require_sound(proto, _tensors(proto), path)
    return proto


def _check_external(tensor: TensorProto, path: Path, roots: tuple[Path, Path]) -> None:
    """By its name the data lies in the model's folder, and behind links there or beside the file that the path leads to."""
    info = {e.key: e.value for e in tensor.external_data}
    location = info.get("location", "")
    file = roots[0] / location
    named = Path(os.path.normpath(file)).is_relative_to(roots[0]) and not Path(location).is_absolute()
    if not named or not any(file.resolve().is_relative_to(root) for root in roots):
        what = f"{path}: tensor {tensor.name!r} points outside the model's folder ({location})"
        raise ModelError(f"{what} and is not read; put its file beside the model")
    if not file.is_file():
        raise ModelError(f"{path}: its weights file {location} is missing; put it beside the model")
    try:
        start, length = int(info.get("offset") or 0), int(info.get("length") or 0)
    except ValueError as e:
        raise _unreadable(path, e) from e
    if min(start, length) < 0 or file.stat().st_size < start + max(length, stored_bytes(tensor)):
        raise ModelError(f"{path}: its weights file {location} is truncated; copy it again")


def _tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """All constant tensors: initializers of all graphs, and attributes."""
    yield from _graph_tensors(proto.graph)
    for function in proto.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for graph in bodies(node):
            yield from _graph_tensors(graph)
