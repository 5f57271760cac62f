"""`qcompile export-integer`: the JSON document of an integer-only model, written to a file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from qcompile.errors import ModelError
from qcompile.ir.atomic import write_atomic
from qcompile.ir.reader import read_proto
from qcompile.oracle.export import export_document
from qcompile.report import SCHEMA_VERSION
from qcompile.verbs.options import Written


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The output."""

    output: Annotated[Path | None, "Default: MODEL with the suffix .json.", Written("OUT.json", short="-o")] = None


@dataclass(frozen=True)
class Exported:
    """The file, how many layers of each kind it holds, and the names of inputs and outputs."""

    output: Path
    bytes: int
    layers: Mapping[str, int]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """`schema_version, output, bytes, layers, inputs, outputs`."""
        names = {"inputs": list(self.inputs), "outputs": list(self.outputs)}
        head = {"schema_version": SCHEMA_VERSION, "output": str(self.output), "bytes": self.bytes}
        return {**head, "layers": dict(self.layers), **names}


def export_file(model: str | Path, output: str | Path) -> Exported:
    """Write the document of `model` to `output`, atomically.

    Raises:
        ModelError: not an integer-only ONNX model, or `output` cannot be written.
    """
    path = Path(model)
    document = export_document(read_proto(path), str(path.parent))
    text = json.dumps(document, allow_nan=False, separators=(",", ":")) + "\n"
    try:
        write_atomic(Path(output), text)
    except OSError as error:
        raise ModelError(f"cannot write {output}: {error.strerror or error}; choose another place with -o") from error
    kinds = Counter(layer["op"] for layer in document["layers"])
    inputs, outputs = (tuple(io["name"] for io in document[side]) for side in ("inputs", "outputs"))
    return Exported(Path(output), len(text), dict(sorted(kinds.items())), inputs, outputs)
