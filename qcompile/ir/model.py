"""Model: an ONNX model with its weights memory-mapped, loaded with distrust and saved atomically."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from qcompile.errors import ModelError
from qcompile.ir.accept import state_types
from qcompile.ir.atomic import Check, atomic_file, beside, place, remove_stale, write_atomic
from qcompile.ir.masks import is_mask
from qcompile.ir.notes import spell, spelled
from qcompile.ir.reader import as_ir, read_ir
from qcompile.ir.spill import is_large
from qcompile.ir.stream import write_model
from qcompile.ir.tensors import data_chunks, external_tensors, map_tensors, named_tensors, read_in, relocated

EXTERNAL_BYTES = 1_500_000_000
READ_BYTES = 1 << 14  # shape inference reads no shape from another file
ORT_MAX_OPSET = 26


@dataclass(frozen=True)
class InputInfo:
    """A graph input: numpy dtype and shape; a dynamic axis is its name or None.

    `ranked`: the file says how many axes it has.  `read`: some node or output needs it.  `masks`: it may hold infinities
    (see `qcompile.ir.masks`).
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]
    ranked: bool = True
    read: bool = True
    masks: bool = False


@dataclass
class Model:
    """An ONNX model that passes work on: `ir` is the onnx_ir model, `path` the file that it came from."""

    ir: ir.Model
    path: Path | None = None

    @property
    def graph(self) -> ir.Graph:
        """The main graph."""
        return self.ir.graph

    @property
    def metadata(self) -> dict[str, str]:
        """Model-level key/value strings, kept in the file."""
        return self.ir.metadata_props

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return self.graph.opset_imports.get("", 1)

    @classmethod
    def load(cls, path: str | Path) -> Model:
        """Read an ONNX file; external weights above 16 KiB, and those of a file from 64 MiB on, are mapped, not read.

        Raises:
            ModelError: no such file, not ONNX, external data missing, truncated or outside the model's folder.
        """
        path = Path(path)
        return _opened(cls(read_ir(path), path), path)

    @classmethod
    def of_file(cls, proto: onnx.ModelProto, path: Path) -> Model:
        """`load` for what `qcompile.ir.reader.read_proto` read from `path`."""
        return _opened(cls(as_ir(proto, path), path), path)

    @classmethod
    def from_proto(cls, proto: onnx.ModelProto, path: Path | None = None) -> Model:
        """Wrap a ModelProto that is in memory."""
        model = cls(ir.from_proto(proto), path)
        _short_domain(model.ir)
        model.name_nodes()
        return model

    def to_proto(self) -> onnx.ModelProto:
        """The model as a self-contained protobuf (under 2 GB; external tensors are read in, notes are written as text)."""
        if not any(True for _ in external_tensors(self.ir)) and not any(True for _ in spelled(self.ir)):
            return state_types(ir.to_proto(self.ir))
        copy = self.clone()
        spell(copy.ir)
        map_tensors(copy.ir, read_in)
        return state_types(ir.to_proto(copy.ir))

    def clone(self) -> Model:
        """An independent copy of the structure; tensors are shared (they are never edited in place)."""
        return Model(self.ir.clone(), self.path)

    def name_nodes(self) -> None:
        """Give every node a unique non-empty name, keeping the names that are already unique.

        Omitted optional outputs stay omitted: naming one would ask the operator to compute it.
        """
        seen = {n.name for n in self.graph.all_nodes() if n.name}
        taken: set[str] = set()
        for i, node in enumerate(self.graph.all_nodes()):
            name = node.name or f"{node.op_type}_{i}"
            if name in taken or (not node.name and name in seen):
                name = _unused(name, taken, seen)
            node.name = name
            taken.add(name)
        omitted = [v for n in self.graph.all_nodes() for v in n.outputs if _omitted(v)]
        NameFixPass()(self.ir)
        for value in omitted:
            value.name = ""

    def inputs(self) -> list[InputInfo]:
        """The inputs that a caller feeds (initializers listed as inputs are left out)."""
        return [_input_info(v) for v in self.graph.inputs if v.name not in self.graph.initializers]

    def weight_bytes(self) -> int:
        """Size of all weights in bytes, those of subgraphs and Constant nodes included."""
        return sum(int(t.nbytes) for _, t in named_tensors(self.ir))

    def digest(self) -> str:
        """SHA-256 over structure and weights: the same for the same model however it is stored."""
        return digest_of(self)

    def save(self, path: str | Path, check: Check | None = None) -> Path:
        """Write the model atomically; weights over 1.5 GB go to a content-named file beside it.

        An unlucky moment leaves either the old file or the new one, never a part.  `check` sees the file before it is `path`;
        what it raises leaves nothing behind.

        Raises:
            ModelError: the folder does not exist or cannot be written, or the disk is full.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise ModelError(f"cannot write {path}: its folder does not exist; create it first")
        try:
            if self.weight_bytes() > EXTERNAL_BYTES:
                return _save_external(self, path, check)
            if is_large(self.graph):
                with atomic_file(path, check=check) as file:
                    write_model(self.ir, file)
                return path
            write_atomic(path, self.to_proto().SerializeToString(deterministic=True), check)
        except OSError as e:
            raise ModelError(f"cannot write {path}: {e.strerror or e}; free some space or choose another place with -o") from e
        return path


def digest_of(model: Model) -> str:
    """SHA-256 hex digest of `model`'s nodes, attributes, notes, interface and weights, initializers in name order."""
    bare, hollow = model.clone(), ir.Tensor(np.zeros(0, np.float32))
    spell(bare.ir)
    map_tensors(bare.ir, lambda _: hollow)
    proto = ir.to_proto(bare.ir)
    del proto.metadata_props[:], proto.graph.value_info[:], proto.graph.initializer[:]
    h = hashlib.sha256(proto.SerializeToString(deterministic=True))
    for name, tensor in named_tensors(model.ir):
        h.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        for piece in data_chunks(tensor):
            h.update(piece)
    return h.hexdigest()


def _opened(model: Model, path: Path) -> Model:
    _short_domain(model.ir)
    map_tensors(model.ir, lambda t: read_in(t) if t.nbytes <= READ_BYTES else t)
    _check_graph(model.ir, path)
    _free_axes(model.ir)
    model.name_nodes()
    return model


def _short_domain(model: ir.Model) -> None:
    """The default operator set is spelled "" from here on; "ai.onnx" means the same."""
    version = model.opset_imports.pop("ai.onnx", None)
    if version is not None:
        model.opset_imports.setdefault("", version)


def _free_axes(model: ir.Model) -> None:
    """A dimension of -1 means what ONNX Runtime takes it for: a dynamic one."""
    for graph in model.graphs():
        for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
            if value.shape is not None and any(isinstance(d, int) and d < 0 for d in value.shape):
                value.shape = ir.Shape([None if isinstance(d, int) and d < 0 else d for d in value.shape])


def _check_graph(model: ir.Model, path: Path) -> None:
    if not len(model.graph) or not model.graph.outputs:
        raise ModelError(f"{path} has an empty graph; export the model again")
    opset = model.opset_imports.get("", 0)
    if opset > ORT_MAX_OPSET:
        raise ModelError(f"{path} uses opset {opset}, ONNX Runtime stops at {ORT_MAX_OPSET}; export at a lower opset")
    known = {v.name for v in model.graph.inputs} | set(model.graph.initializers)
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.producer() is None and value.name not in known:
                raise ModelError(f"{path}: node {node.name!r} reads {value.name!r}, which nothing makes; export the model again")


def _omitted(output: ir.Value) -> bool:
    return not output.name and not output.uses() and not output.is_graph_output()


def _unused(name: str, taken: set[str], seen: set[str]) -> str:
    i = 1
    while f"{name}_{i}" in taken or f"{name}_{i}" in seen:
        i += 1
    return f"{name}_{i}"


def _input_info(value: ir.Value) -> InputInfo:
    dims = value.shape if value.shape is not None else ()
    shape = tuple((d if d >= 0 else None) if isinstance(d, int) else d.value for d in dims)
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    read = bool(value.uses()) or value.is_graph_output()
    return InputInfo(str(value.name), np.dtype(dtype), shape, value.shape is not None, read, is_mask(value))


def _save_external(model: Model, path: Path, check: Check | None) -> Path:
    """External data under its content's name first, the .onnx last."""
    path = place(path)
    remove_stale(path)
    staging = beside(path)
    data = f"{staging.name}.data"
    try:
        copy = model.clone()
        spell(copy.ir)
        ir.save(copy.ir, staging, external_data=data)
        digest = _file_digest(staging.with_name(data))
        final = path.with_name(f"{path.stem}.{digest[:16]}.data")
        _rename_location(staging, data, final.name)
        was_there = final.exists()
        os.replace(staging.with_name(data), final)
        _checked_pair(staging, None if was_there else final, check)
        os.replace(staging, path)
    finally:
        for leftover in (staging, staging.with_name(data)):
            leftover.unlink(missing_ok=True)
    return path


def _checked_pair(staging: Path, data: Path | None, check: Check | None) -> None:
    """`check` the staged model; its data goes with it where it fails."""
    try:
        if check is not None:
            check(staging)
    except BaseException:
        if data is not None:
            data.unlink()
        raise


def _rename_location(staging: Path, old: str, new: str) -> None:
    staged = ir.load(staging)
    map_tensors(staged, lambda t: relocated(t, new) if isinstance(t, ir.ExternalTensor) and t.location == old else t)
    write_atomic(staging, state_types(ir.to_proto(staged)).SerializeToString(deterministic=True))


def _file_digest(file: Path) -> str:
    with file.open("r+b") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
        os.fsync(f.fileno())
    return digest
