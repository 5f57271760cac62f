"""What is known of an engine without running it: its manifest, and whether the files beside it are the ones it speaks of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qcompile.backend.manifest import is_engine, manifest_path, sha256
from qcompile.errors import ModelError

_SHOWN = (
    "backend",
    "version",
    "versions",
    "target",
    "compute_capabilities",
    "profiles",
    "flags",
    "options",
    "compiled",
    "warnings",
)


def engine_of(path: Path) -> Path | None:
    """The engine that `path` (an engine, or its manifest `X.engine.json`) speaks of; None for anything else.

    Raises:
        ModelError: a manifest that cannot be read, or an engine without one.
    """
    if path.suffix == ".json":
        _manifest(path)
        return path.with_suffix("")
    if not path.is_file() or not is_engine(path):
        return None
    if not manifest_path(path).is_file():
        raise ModelError(
            f"{path} is a TensorRT engine without a manifest ({manifest_path(path).name}), and it tells nothing by itself; "
            "build it with qcompile build, or look at it on its GPU with: polygraphy inspect model"
        )
    return path


def engine_card(engine: Path) -> dict[str, Any]:
    """The manifest of `engine` with `engine` and `onnx` completed by `matches` (null: the file is not there) and `audits`.

    Raises:
        ModelError: the manifest cannot be read.
    """
    manifest = _manifest(manifest_path(engine))
    source = engine.with_name(str(manifest["onnx"]["file"]))
    return {
        **{key: manifest.get(key) for key in _SHOWN},
        "engine": {**manifest["engine"], "matches": _matches(engine, manifest["engine"]["sha256"])},
        "onnx": {**manifest["onnx"], "matches": _matches(source, manifest["onnx"]["sha256"])},
        "audits": manifest.get("audit", {}),
    }


def _matches(file: Path, digest: str) -> bool | None:
    return sha256(file) == digest if file.is_file() else None


def _manifest(path: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        if found["engine"]["sha256"] and found["onnx"]["sha256"] and found["onnx"]["file"]:
            return found
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}; give the path of a model or an engine") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise ModelError(f"{path} is not the manifest of an engine; qcompile build writes one beside the engine")
