"""`qcompile export-integer`: the JSON document of an integer-only model, written to a file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from qcompile.errors import ModelError
from qcompile.ir.atomic import write_atomic
from qcompile.ir.reader import read_proto
from qcompile.oracle.export import export_document


def export_file(model: str | Path, output: str | Path) -> dict[str, Any]:
    """Write the document of `model` to `output`, atomically.

    Returns:
        `output, bytes, layers` (how many of each kind), `inputs` and `outputs` (names).

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
    names = {side: [io["name"] for io in document[side]] for side in ("inputs", "outputs")}
    return {"output": str(output), "bytes": len(text), "layers": dict(sorted(kinds.items())), **names}
