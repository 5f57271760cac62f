"""Code of others: libraries of operators that ONNX Runtime and TensorRT do not have.  Only a command names one, never a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from qcompile.backend.process import use_plugins
from qcompile.errors import UsageError
from qcompile.execute.session import use_libraries
from qcompile.verbs.options import Written


@dataclass(frozen=True, kw_only=True)
class OrtLibraryOptions:
    """Operators of others."""

    ort_library: Annotated[
        tuple[str, ...], "Library of custom operators, for ONNX Runtime; repeatable.", Written("PATH", once=True)
    ] = ()


@dataclass(frozen=True, kw_only=True)
class PluginOptions:
    """Operators of others."""

    plugin: Annotated[tuple[str, ...], "Library of TensorRT plugins, for engines; repeatable.", Written("PATH", once=True)] = ()


def load_libraries(options: Any) -> None:
    """Let sessions and builders of this process know the libraries that `options` name, and no others.

    Raises:
        UsageError: there is no such file, or ONNX Runtime cannot load it.
    """
    use_libraries([_file(path, "--ort-library") for path in getattr(options, "ort_library", ())])
    use_plugins([_file(path, "--plugin") for path in getattr(options, "plugin", ())])


def _file(path: str, flag: str) -> str:
    if not Path(path).is_file():
        raise UsageError(f"{flag}: no library at {path}; check the path")
    return str(Path(path).resolve())
