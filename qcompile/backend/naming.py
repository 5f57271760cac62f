"""Node names for the builder: unique, and such that its messages and its kernel dump can be told apart into names again."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx import ModelProto

from qcompile.ir.reader import read_proto
from qcompile.target.view import inner_nodes, name_nodes, uniquely_named

_UNCLEAR = re.compile(r"[^ -~]|, (?=LayerType: )")  # the dump separates names by control characters


@contextmanager
def uniquely_named_file(path: Path) -> Generator[Path]:
    """`path` itself if its node names are unique and not empty, else a temporary copy with unique names."""
    model = read_proto(path, weights=False)
    if uniquely_named(model) is model:
        yield path
        return
    with _edited(path, model, name_nodes) as copy:
        yield copy


@contextmanager
def dumpable_file(path: Path, model: ModelProto) -> Generator[tuple[Path, dict[str, str]]]:
    """`path` itself, or where a dump of its names could not be read a temporary copy with other names.

    `model` is what stands at `path`.  Also what each node of the copy is called in `uniquely_named(model)`.
    """
    named = uniquely_named(model)
    names = [n.name for n in (*named.graph.node, *inner_nodes(named.graph)) if n.name]
    if named is model and len(set(names)) == len(names) and not any(_UNCLEAR.search(n) for n in names):
        yield path, {}
        return
    renamed = ModelProto()
    renamed.CopyFrom(model)
    _rename(renamed)
    called = {new.name: old.name for new, old in zip(renamed.graph.node, named.graph.node, strict=True)}
    with _edited(path, model, _rename) as copy:
        yield copy, called


def _rename(model: ModelProto) -> None:
    """Plain names; those of bodies, which the dump writes beside the names of the main graph, are numbers."""
    name_nodes(model)
    for node in model.graph.node:
        node.name = _UNCLEAR.sub("_", node.name)
    name_nodes(model)
    for i, node in enumerate(inner_nodes(model.graph)):
        node.name = f"body:{i}"


@contextmanager
def _edited(path: Path, skeleton: ModelProto, edit: Callable[[ModelProto], None]) -> Generator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        full = read_proto(path)
        edit(full)
        external = any(t.external_data for t in skeleton.graph.initializer)
        onnx.save(full, str(copy), save_as_external_data=external)
        yield copy
