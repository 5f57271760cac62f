"""The manifest: a JSON document beside an engine that says what it is and what it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from qcompile.backend.options import BuildOptions
from qcompile.backend.process import MODULES
from qcompile.backend.profile import Profile
from qcompile.errors import BackendError
from qcompile.ir.atomic import write_atomic

MANIFEST_VERSION = 2
ENGINE_MAGIC = b"trt"  # at byte 1 of a plan: vtrt (RTX), ptrt, ftrt
_KEPT = ("pipeline", "target", "scheme", "source", "version")


def manifest_path(engine: Path) -> Path:
    """`model.engine` -> `model.engine.json`."""
    return engine.with_name(engine.name + ".json")


def write_manifest(engine: Path, manifest: dict[str, Any]) -> Path:
    """Write the manifest of `engine` beside it, atomically; call again with an `audit` entry added to record the audit.

    Raises:
        BackendError: the disk is full, or the folder not writable.
    """
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    try:
        return write_atomic(manifest_path(engine), text)
    except OSError as error:
        raise BackendError(
            f"cannot write {manifest_path(engine)}: {error.strerror or error}; free space or choose another folder"
        ) from error


def read_manifest(engine: Path) -> dict[str, Any]:
    """The manifest beside `engine`; empty when there is none that can be read."""
    try:
        found: Any = json.loads(manifest_path(engine).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_engine(path: Path) -> bool:
    """Whether the file begins as a TensorRT plan does, or has an engine's manifest beside it."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError:
        return False
    return head[1:] == ENGINE_MAGIC or "engine" in read_manifest(path)


def make_manifest(
    source: Path,
    model: onnx.ModelProto,
    engine: Path,
    *,
    target: str,
    backend_version: str,
    header: str | None,
    seconds: float,
    gpus: Sequence[str],
    profiles: Sequence[Profile],
    options: BuildOptions,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """The manifest of a file just built from `source`."""
    props = {p.key.removeprefix("qcompile."): p.value for p in model.metadata_props if p.key.startswith("qcompile.")}
    return {
        "schema_version": MANIFEST_VERSION,
        "backend": MODULES[target],
        "version": backend_version,
        "versions": {MODULES[target]: backend_version, "polygraphy": version("polygraphy"), "onnx": onnx.__version__},
        "target": target,
        "compute_capabilities": list(gpus),
        "profiles": [{"shapes": p.to_json(), "source": p.source} for p in profiles],
        "flags": list(options.flags),
        "options": options.to_json(),
        "timing_cache": _cache(options),
        "onnx": {"file": source.name, "sha256": sha256(source), "external": _external_digests(model, source.parent)},
        "compiled": {key: props[key] for key in _KEPT if key in props},
        "engine": {"sha256": sha256(engine), "size": engine.stat().st_size, "header": header},
        "build_seconds": round(seconds, 3),
        "warnings": list(warnings),
    }


def _cache(options: BuildOptions) -> dict[str, str] | None:
    cache = options.timing_cache
    return None if cache is None or not cache.is_file() else {"file": cache.name, "sha256": sha256(cache)}


def _external_digests(model: onnx.ModelProto, folder: Path) -> dict[str, str]:
    locations = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    return {name: sha256(folder / name) for name in sorted(locations)}


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
