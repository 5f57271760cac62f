"""Engines on this machine's GPU: outputs and latencies."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.backend.device import local_gpu
from qcompile.backend.manifest import is_engine, read_manifest
from qcompile.backend.process import EXTRAS, MODULES, ask_worker, require_trt
from qcompile.backend.tensorrt import quoted
from qcompile.errors import BackendError, ModelError, UsageError

_WORKER = "qcompile.backend.infer"
_RTX_MAGIC = b"vtrt"
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class EngineRuns:
    """What one backend made of its engines: the inputs, and for each engine its outputs and its milliseconds."""

    gpu: str
    backend: str
    feeds: Arrays
    outputs: tuple[Arrays, ...]
    milliseconds: tuple[list[float], ...]


def engine_target(path: Path) -> str:
    """`rtx` or `trt`: what the manifest says, else what the file begins with.

    Raises:
        ModelError: no such file, or not an engine.
    """
    if not path.is_file():
        raise ModelError(f"cannot read {path}: no such file; give the path of an engine")
    if not is_engine(path):
        raise ModelError(f"{path} is not a TensorRT engine; build one with: qcompile build")
    with path.open("rb") as file:
        begins_as_rtx = file.read(4) == _RTX_MAGIC
    return str(read_manifest(path).get("target", "rtx" if begins_as_rtx else "trt"))


def run_engines(paths: Sequence[Path], *, runs: int, seed: int) -> EngineRuns:
    """Run engines of one backend on the same made-up inputs, interleaved.

    Raises:
        ModelError: a path is no engine.
        UsageError: the engines are of different backends.
        BackendError: no GPU, no backend, or an engine does not load or run.
    """
    targets = {engine_target(p) for p in paths}
    gpu = local_gpu()
    if gpu is None:
        raise BackendError(
            f"running {paths[0].name} needs an NVIDIA GPU and its driver, and this machine has none; run this on the GPU machine"
            " (`qcompile audit` shows the kernels without one)"
        )
    if len(targets) > 1:
        raise UsageError("engines of TensorRT and of TensorRT-RTX cannot be timed in one process; compare those of one backend")
    return _run(paths, targets.pop(), gpu, runs, seed)


def _run(paths: Sequence[Path], target: str, gpu: str, runs: int, seed: int) -> EngineRuns:
    module = require_trt(target)
    with tempfile.TemporaryDirectory(prefix="qcompile-run-") as folder:
        request = {"module": module, "engines": [str(p) for p in paths], "folder": folder, "runs": runs, "seed": seed}
        reply = ask_worker(_WORKER, request, target)
        _raise_failure(reply, paths, target, gpu)
        feeds, *outputs = (_arrays(Path(folder) / f"{n}.npz") for n in ("feeds", *range(len(paths))))
    return EngineRuns(gpu, f"{MODULES[target]} {reply['version']}", feeds, tuple(outputs), tuple(reply["milliseconds"]))


def _raise_failure(reply: dict[str, Any], paths: Sequence[Path], target: str, gpu: str) -> None:
    if reply["ok"]:
        return
    if not reply["version"]:
        raise BackendError(f"{MODULES[target]} does not load ({quoted(reply['errors'])}); reinstall 'qcompile[{EXTRAS[target]}]'")
    raise BackendError(
        f"{MODULES[target]} {reply['version']} cannot run the engines on {gpu}: {quoted(reply['errors'])}"
        f" ({'; '.join(_origin(p) for p in paths)}); build them with this version for this GPU"
    )


def _origin(path: Path) -> str:
    made = read_manifest(path)
    if not made:
        return f"{path.name} has no manifest"
    return f"{path.name} was built with {made.get('backend')} {made.get('version')} for {made.get('compute_capabilities')}"


def _arrays(path: Path) -> Arrays:
    with np.load(path, allow_pickle=False) as held:
        return {name: held[name] for name in held.files}
