"""What is known of an engine without running it: its manifest, and whether the files beside it are the ones it speaks of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qcompile.backend.manifest import is_engine, manifest_path, sha256
from qcompile.errors import ModelError
from qcompile.report import SCHEMA_VERSION


@dataclass(frozen=True)
class RecordedFile:
    """A file as the manifest records it, and whether the one here is it; None: there is none."""

    recorded: Mapping[str, Any]
    matches: bool | None

    @property
    def sha256(self) -> str:
        """Its digest, as recorded."""
        return str(self.recorded["sha256"])

    def to_json(self) -> dict[str, Any]:
        """What is recorded, and `matches`."""
        return {**self.recorded, "matches": self.matches}


@dataclass(frozen=True, kw_only=True)
class EngineCard:
    """What the manifest of the engine at `path` says, and whether it is true; None where the manifest says nothing.

    `profiles`, `options`, `compiled` and `audits` (by GPU) are the documents that it holds.
    """

    path: Path
    backend: str | None
    version: str | None
    versions: Mapping[str, Any] | None
    target: str | None
    compute_capabilities: Sequence[str] | None
    profiles: Sequence[Mapping[str, Any]] | None
    flags: Sequence[str] | None
    options: Mapping[str, Any] | None
    compiled: Mapping[str, Any] | None
    warnings: Sequence[str] | None
    engine: RecordedFile
    onnx: RecordedFile
    audits: Mapping[str, Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """`schema_version`, `kind` ("engine") and the fields."""
        files = {"path": str(self.path), "engine": self.engine.to_json(), "onnx": self.onnx.to_json()}
        return {"schema_version": SCHEMA_VERSION, "kind": "engine", **vars(self), **files}


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


def engine_card(engine: Path) -> EngineCard:
    """What is known of `engine`.

    Raises:
        ModelError: the manifest cannot be read.
    """
    manifest = _manifest(manifest_path(engine))
    source = engine.with_name(str(manifest["onnx"]["file"]))
    said = {f.name: manifest.get(f.name) for f in fields(EngineCard) if f.name not in ("path", "engine", "onnx", "audits")}
    return EngineCard(
        path=engine, **said, engine=_file(engine, manifest["engine"]), onnx=_file(source, manifest["onnx"]),
        audits=manifest.get("audit", {}),
    )  # fmt: skip


def _file(file: Path, recorded: Mapping[str, Any]) -> RecordedFile:
    return RecordedFile(recorded, sha256(file) == recorded["sha256"] if file.is_file() else None)


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
