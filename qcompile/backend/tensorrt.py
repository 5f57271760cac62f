"""Engines through polygraphy and TensorRT or TensorRT-RTX, built in a subprocess (see `worker`)."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from qcompile.backend.profile import Profile, check_profile, default_profile
from qcompile.errors import BackendError, UsageError
from qcompile.ir.atomic import write_atomic
from qcompile.target.view import load_graph_only

MODULES = {"rtx": "tensorrt_rtx", "trt": "tensorrt"}
EXTRAS = {"rtx": "rtx", "trt": "tensorrt"}
MANIFEST_VERSION = 1
ERROR_LINES = 4
_NOISE = re.compile(r"^ModelImporter\.cpp:\d+: (ERROR: )?|\[checkMacros\.cpp::catchCudaError.*$")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class BuildResult:
    """A built engine: where it is, how long it took, how large it is, and its manifest (a JSON document)."""

    path: Path
    manifest_path: Path
    seconds: float
    size: int
    version: str
    profiles: tuple[Profile, ...]
    manifest: dict[str, Any]


@dataclass(frozen=True)
class BuiltPlan:
    """What the worker reports of one build; `layers` is the kernel dump when asked for."""

    version: str
    seconds: float
    size: int
    layers: str


def require_trt(target: str) -> str:
    """The name of the Python module behind `target` ("rtx" or "trt"), which is installed.

    Raises:
        UsageError: no such engine target.
        BackendError: the module is not installed; it is never replaced by another.
    """
    if target not in MODULES:
        raise UsageError(f"target {target!r} builds no engine; use one of {', '.join(MODULES)}")
    if importlib.util.find_spec(MODULES[target]) is not None:
        return MODULES[target]
    other = ", or use --target rtx, which builds on any machine" if target == "trt" else ""
    raise BackendError(f"{MODULES[target]} is not installed; run pip install 'qcompile[{EXTRAS[target]}]'{other}")


def load_trt(target: str) -> ModuleType:
    """The imported TensorRT module of `target`.

    Raises:
        BackendError: it is not installed, or its libraries do not load.
    """
    name = require_trt(target)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BackendError(f"{name} is installed but does not load ({error}); reinstall 'qcompile[{EXTRAS[target]}]'") from error


def capability(gpu: str) -> tuple[int, int]:
    """`sm89` -> (8, 9).

    Raises:
        UsageError: not of that form.
    """
    match = re.fullmatch(r"sm_?(\d{1,2})(\d)", gpu.strip().lower())
    if match is None:
        raise UsageError(f"{gpu!r} is not a GPU name; write sm and the compute capability, e.g. sm89")
    return int(match[1]), int(match[2])


def run_worker(
    onnx_path: Path, out: Path | None, *, target: str, gpus: Sequence[str], profiles: Sequence[Profile], layers: bool = False
) -> BuiltPlan:
    """Build once in a subprocess.

    Raises:
        BackendError: the backend is missing, knows no such GPU, refuses the model, or crashes.
    """
    require_trt(target)
    request = {
        "onnx": str(onnx_path),
        "out": None if out is None else str(out),
        "rtx": target == "rtx",
        "capabilities": [capability(g) for g in gpus] if target == "rtx" else [],
        "profiles": [p.to_json() for p in profiles],
        "layers": layers,
    }
    env = os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1" if target == "rtx" else "0"}
    command = [sys.executable, "-m", "qcompile.backend.worker"]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=env, check=False)
    reply = _reply(done, MODULES[target])
    _raise_failure(reply, onnx_path, MODULES[target])
    return BuiltPlan(reply["version"], reply["seconds"], reply["size"], reply["layers"])


def _reply(done: subprocess.CompletedProcess[str], module: str) -> dict[str, Any]:
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        raise BackendError(
            f"the {module} builder {_crash(done)}; run `qcompile check` on the model for the likely cause"
        ) from None


def _crash(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"crashed (signal {-done.returncode})"
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return f"ended with status {done.returncode}: {last[0][:400]}"


def _raise_failure(reply: dict[str, Any], onnx_path: Path, module: str) -> None:
    if reply.get("unknown"):
        supported = [n.lower() for n in reply["capabilities"] if n.startswith("SM")]
        names = ", ".join(n.lower() for n in reply["unknown"])
        raise BackendError(f"{module} {reply['version']} has no target {names}; choose --gpu from {', '.join(supported)}")
    if not reply["ok"]:
        quoted = " | ".join(_relevant(reply["errors"]))
        what = f"{module} {reply['version']} cannot build {onnx_path.name}"
        raise BackendError(f"{what}: {quoted}; run `qcompile check` for the cause")


def _relevant(errors: Sequence[str]) -> list[str]:
    """The last few distinct messages, shortened; Polygraphy's own summary only if there is nothing else."""
    own = [e for e in errors if not e.startswith("PolygraphyException")] or list(errors)
    cleaned = (_NOISE.sub("", " ".join(e.split()))[:400].strip() for e in own)
    return list(dict.fromkeys(e for e in cleaned if e and not e.startswith("---")))[-ERROR_LINES:] or ["no message"]


def plan_profiles(model: onnx.ModelProto, given: Sequence[Profile] | None) -> tuple[Profile, ...]:
    """`given` after a check against the model, or the default profile (empty when every shape is fixed).

    Raises:
        UsageError: a given profile does not fit.
    """
    if given:
        for profile in given:
            check_profile(model, profile)
        return tuple(given)
    guessed = default_profile(model)
    return () if guessed is None else (guessed,)


def build_engine(
    onnx_path: str | Path,
    out_path: str | Path,
    *,
    target: str,
    gpus: Sequence[str] = ("sm89",),
    profiles: Sequence[Profile] | None = None,
    progress: Progress | None = None,
) -> BuildResult:
    """Build `onnx_path` (strongly typed: its Q/DQ alone decide the precision) and write engine and manifest atomically.

    `gpus` are compute capabilities for `rtx`; `trt` builds for the GPU of this machine and ignores them.

    Raises:
        ModelError: not an ONNX file.
        UsageError: a GPU name or a profile is wrong.
        BackendError: the backend is missing or refuses the model; its last error lines are quoted.
    """
    require_trt(target)
    source, out = Path(onnx_path), Path(out_path)
    model = load_graph_only(source)
    chosen = plan_profiles(model, profiles)
    if progress is not None:
        where = ", ".join(gpus) if target == "rtx" else "this machine's GPU"
        progress(f"building {out.name} with {MODULES[target]} for {where}")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=_folder(out)) as scratch:
        draft = Path(scratch) / out.name
        plan = run_worker(source, draft, target=target, gpus=gpus, profiles=chosen)
        manifest = _manifest(source, model, draft, plan, target, gpus, chosen)
        os.replace(draft, out)
    write_manifest(out, manifest)
    return BuildResult(out, manifest_path(out), plan.seconds, plan.size, plan.version, chosen, manifest)


def _folder(out: Path) -> Path:
    if not out.parent.is_dir():
        raise UsageError(f"the folder {out.parent} does not exist; make it or choose another place for the engine")
    return out.parent


def manifest_path(engine: Path) -> Path:
    """`model.engine` -> `model.engine.json`."""
    return engine.with_name(engine.name + ".json")


def write_manifest(engine: Path, manifest: dict[str, Any]) -> Path:
    """Write the manifest of `engine` beside it, atomically; call again with an `audit` entry added to record the audit."""
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    try:
        return write_atomic(manifest_path(engine), text)
    except OSError as error:
        raise BackendError(
            f"cannot write {manifest_path(engine)}: {error.strerror or error}; free space or choose another folder"
        ) from error


def _manifest(
    source: Path,
    model: onnx.ModelProto,
    engine: Path,
    plan: BuiltPlan,
    target: str,
    gpus: Sequence[str],
    profiles: Sequence[Profile],
) -> dict[str, Any]:
    return {
        "schema_version": MANIFEST_VERSION,
        "backend": MODULES[target],
        "version": plan.version,
        "target": target,
        "compute_capabilities": list(gpus) if target == "rtx" else ["current"],
        "profiles": [{"shapes": p.to_json(), "source": p.source} for p in profiles],
        "flags": ["STRONGLY_TYPED"],
        "onnx": {"file": source.name, "sha256": _sha256(source), "external": _external_digests(model, source.parent)},
        "engine": {"sha256": _sha256(engine), "size": plan.size},
        "build_seconds": round(plan.seconds, 3),
    }


def _external_digests(model: onnx.ModelProto, folder: Path) -> dict[str, str]:
    locations = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    return {name: _sha256(folder / name) for name in sorted(locations)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
