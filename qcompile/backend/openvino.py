"""Models on OpenVINO's CPU plugin."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from qcompile.errors import BackendError

Arrays = Mapping[str, NDArray[Any]]
_HINTS = {"PERFORMANCE_HINT": "LATENCY"}


def is_installed() -> bool:
    """Whether the plugin is here."""
    return bool(importlib.util.find_spec("openvino"))


def answers(path: Path, feeds: Sequence[Arrays]) -> list[list[NDArray[Any]]]:
    """All outputs of the model at `path` for every feed, in its default settings.

    Raises:
        BackendError: the plugin refuses the model, or fails on a feed.
    """
    openvino: Any = importlib.import_module("openvino")
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", _HINTS)
        named = [set(port.get_names()) for port in compiled.inputs]
        return [_run(compiled, named, feed) for feed in feeds]
    except RuntimeError as error:
        line = (str(error).strip().splitlines() or ["no message"])[-1].strip()
        raise BackendError(f"OpenVINO {openvino.__version__} cannot run it: {line}") from error


def _run(compiled: Any, named: Sequence[set[str]], feed: Arrays) -> list[NDArray[Any]]:
    given = {i: array for i, names in enumerate(named) for name, array in feed.items() if name in names}
    found = compiled(given)
    return [found[port].copy() for port in compiled.outputs]
