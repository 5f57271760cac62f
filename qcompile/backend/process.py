"""Workers: TensorRT in a process of its own, a JSON request on stdin, a JSON reply on stdout.

Polygraphy chooses between `tensorrt` and `tensorrt_rtx` by an environment variable that it reads at import, and the
builder writes to the process's standard output and may abort the process: both are reasons for a subprocess.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from qcompile.errors import BackendError, BuildError, UsageError
from qcompile.target.catalog import TARGETS

ENGINES = {t.name: t.engine for t in TARGETS.values() if t.engine is not None}
MODULES = {name: e.module for name, e in ENGINES.items()}
EXTRAS = {name: e.extra for name, e in ENGINES.items()}
_KILLED = 9  # SIGKILL
_WINDOWS_CRASH = 0xC0000000  # NTSTATUS errors, e.g. an access violation
Serve = Callable[[dict[str, Any], dict[str, Any]], None]
_plugins: list[str] = []


def use_plugins(paths: Sequence[str]) -> None:
    """Workers that are asked from now on load these plugin libraries, and no others."""
    _plugins[:] = paths


def plugins() -> tuple[str, ...]:
    """The libraries that workers load."""
    return tuple(_plugins)


def require_trt(target: str) -> str:
    """The name of the Python module behind `target`, which is installed.

    Raises:
        UsageError: no such engine target.
        BackendError: the module is not installed; it is never replaced by another.
    """
    if target not in MODULES:
        raise UsageError(f"target {target!r} builds no engine; use one of {', '.join(MODULES)}")
    if importlib.util.find_spec(MODULES[target]) is not None:
        return MODULES[target]
    anywhere = [name for name, e in ENGINES.items() if e.named_gpus and not ENGINES[target].named_gpus]
    other = f", or use --target {' or '.join(anywhere)}, which builds on any machine" if anywhere else ""
    raise BackendError(f"{MODULES[target]} is not installed; run pip install 'qcompile[{EXTRAS[target]}]'{other}")


def ask_worker(module: str, request: dict[str, Any], target: str) -> dict[str, Any]:
    """Run `python -m module` on `request` and return its reply.

    The worker is killed when this process is interrupted.

    Raises:
        BuildError: the library crashed or aborted.
        BackendError: the worker was killed, or ended in another way without a reply.
    """
    own = {"POLYGRAPHY_USE_TENSORRT_RTX": "1" if ENGINES[target].rtx else "0"}
    env = {"OPENBLAS_NUM_THREADS": "1", **os.environ, **own}
    command = [sys.executable, "-m", module]
    asked = json.dumps(request | ({"plugins": _plugins} if _plugins else {}))
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=env, check=False)
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        raise _death(done, MODULES[target]) from None


def _death(done: subprocess.CompletedProcess[str], name: str) -> BackendError:
    if done.returncode == -_KILLED:
        return BackendError(f"the {name} process was killed, as happens when memory runs out; free some, or lower the profile")
    if done.returncode < 0 or done.returncode >= _WINDOWS_CRASH:
        return BuildError(f"the {name} library crashed ({_signal(done.returncode)})")
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return BackendError(f"the {name} process ended with status {done.returncode}: {last[0][:400]}; reinstall qcompile and {name}")


def _signal(status: int) -> str:
    return f"signal {-status}" if status < 0 else f"status {status:#x}"


def serve(work: Serve, reply: dict[str, Any]) -> int:
    """The worker's side: read the request, load its plugins, let `work` fill `reply`, write it; 0 whenever a reply was written.

    What `work` raises is appended to `reply["errors"]`.
    """
    stream = _reply_stream()
    request = json.load(sys.stdin)
    try:
        if request.get("plugins"):
            _load_plugins(request)
        work(request, reply)
    except Exception as error:
        reply["ok"] = False
        reply["errors"] = [*reply["errors"], f"{type(error).__name__}: {error}"]
    with contextlib.closing(stream):
        json.dump(reply, stream)
    return 0


def _reply_stream() -> TextIO:
    """The real stdout, after file descriptor 1 is pointed at stderr so that no library can write into the reply."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def collecting_logger(trt: Any, keep: str | None = None) -> Any:
    """A `trt.ILogger` that keeps errors, and in `layers` the messages that start with `keep`; it drops the rest."""

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)
            elif keep is not None and msg.startswith(keep):
                self.layers += msg

    return Collector()


def _load_plugins(request: dict[str, Any]) -> None:
    """Libraries that export their creators go through the registry; others register them when they are loaded.

    Raises:
        OSError: a library cannot be loaded.
    """
    trt = importlib.import_module(request["module"])
    for path in request["plugins"]:
        library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        if hasattr(library, "getPluginCreators") or hasattr(library, "getCreators"):
            trt.get_plugin_registry().load_library(path)
