"""Engines through polygraphy and TensorRT or TensorRT-RTX, built in a subprocess (see `worker`)."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from qcompile.backend.device import local_gpu
from qcompile.backend.manifest import is_engine, make_manifest, manifest_path, write_manifest
from qcompile.backend.options import DEFAULTS, BuildOptions, require_options
from qcompile.backend.process import ENGINES, EXTRAS, MODULES, ask_worker, require_trt
from qcompile.backend.profile import Profile, check_profile, default_profile, outside_calibration
from qcompile.errors import BackendError, BuildError, ModelError, UsageError
from qcompile.ir.atomic import write_atomic
from qcompile.ir.reader import read_proto
from qcompile.report import Note

ERROR_LINES = 4
_NOISE = re.compile(r"^ModelImporter\.cpp:\d+: (ERROR: )?|\[checkMacros\.cpp::catchCudaError.*$")
_WORKER = "qcompile.backend.worker"


@dataclass(frozen=True)
class BuildResult:
    """A built engine: where it is, how long it took, how large it is, its manifest (a JSON document), and warnings."""

    path: Path
    manifest_path: Path
    seconds: float
    size: int
    version: str
    profiles: tuple[Profile, ...]
    manifest: dict[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def backend(self) -> str:
        """The Python module that built it."""
        return str(self.manifest["backend"])


@dataclass(frozen=True)
class BuiltPlan:
    """What the worker reports of one build; `layers` is the kernel dump when asked for, `header` the runtime's verdict."""

    version: str
    seconds: float
    size: int
    layers: str
    header: str | None = None


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
    onnx_path: Path,
    out: Path | None,
    *,
    target: str,
    gpus: Sequence[str],
    profiles: Sequence[Profile],
    layers: bool = False,
    options: BuildOptions = DEFAULTS,
) -> BuiltPlan:
    """Build once in a subprocess; `out` None builds without saving.

    Raises:
        BackendError: the backend is missing or too old, knows no such GPU, or the engine cannot be written.
        BuildError: it refuses the model, or crashes on it.
    """
    require_trt(target)
    request = {
        "module": MODULES[target],
        "onnx": str(onnx_path),
        "out": None if out is None else str(out),
        "rtx": ENGINES[target].rtx,
        "capabilities": [capability(g) for g in gpus] if ENGINES[target].named_gpus else [],
        "profiles": [p.to_json() for p in profiles],
        "layers": layers,
        "options": {**vars(options), "timing_cache": None if options.timing_cache is None else str(options.timing_cache)},
    }
    try:
        reply = ask_worker(_WORKER, request, target)
    except BuildError as error:
        raise BuildError(f"{error} while building {onnx_path.name}; run `qcompile check` for the likely cause") from None
    _raise_failure(reply, onnx_path, target)
    return BuiltPlan(reply["version"], reply["seconds"], reply["size"], reply["layers"], reply.get("header"))


def _raise_failure(reply: dict[str, Any], onnx_path: Path, target: str) -> None:
    if reply["ok"]:
        return
    module = MODULES[target]
    if not reply["version"]:
        raise BackendError(f"{module} does not load ({quoted(reply['errors'])}); reinstall 'qcompile[{EXTRAS[target]}]'")
    named = f"{module} {reply['version']}"
    if reply.get("unknown"):
        supported = [n.lower() for n in reply["capabilities"] if n.startswith("SM")]
        names = ", ".join(n.lower() for n in reply["unknown"])
        raise BackendError(f"{named} has no target {names}; choose --gpu from {', '.join(supported)}")
    if reply.get("unsupported"):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in reply["unsupported"])
        raise BackendError(f"{named} has no {options}; drop it, or install a newer version")
    if reply.get("unwritable"):
        raise BackendError(f"cannot write the engine: {reply['unwritable']}; free space or choose another folder")
    raise BuildError(f"{named} cannot build {onnx_path.name}: {quoted(reply['errors'])}; run `qcompile check` for the cause")


def quoted(errors: Sequence[str]) -> str:
    """The last few distinct messages, shortened; Polygraphy's own summary only if there is nothing else."""
    own = [e for e in errors if not e.startswith("PolygraphyException")] or list(errors)
    cleaned = (_NOISE.sub("", " ".join(e.split()))[:400].strip() for e in own)
    lines = list(dict.fromkeys(e for e in cleaned if e and not e.startswith("---")))[-ERROR_LINES:]
    return " | ".join(lines) or "no message"


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
    options: BuildOptions = DEFAULTS,
    progress: Note | None = None,
) -> BuildResult:
    """Build `onnx_path` (strongly typed: its Q/DQ alone decide the precision) and write engine and manifest atomically.

    `gpus` are compute capabilities for `rtx`; `trt` builds for the GPU of this machine and ignores them.

    Raises:
        ModelError: not an ONNX file.
        UsageError: a GPU name or a profile is wrong, or the folder of `out_path` is missing or not writable.
        BackendError: the backend is missing or lacks an option, or the disk is full.
        BuildError: it refuses the model; its last error lines are quoted.
    """
    require_trt(target)
    require_options(target, options)
    source, out = Path(onnx_path), Path(out_path)
    model = graph_of(source)
    chosen = plan_profiles(model, profiles)
    warnings = tuple(line for p in chosen for line in outside_calibration(model, p))
    where = tuple(gpus) if ENGINES[target].named_gpus else (local_gpu() or "current",)
    if progress is not None:
        progress(f"building {out.name} with {MODULES[target]} for {', '.join(where)}")
    with scratch(out) as folder:
        draft, cache = folder / out.name, _cache_copy(options, folder)
        plan = run_worker(source, draft, target=target, gpus=gpus, profiles=chosen, options=cache)
        warnings = (*warnings, *_keep_cache(options, cache))
        manifest = make_manifest(
            source, model, draft, target=target, backend_version=plan.version, header=plan.header, seconds=plan.seconds,
            gpus=where, profiles=chosen, options=options, warnings=warnings,
        )  # fmt: skip
        write_manifest(out, manifest)
        os.replace(draft, out)
    return BuildResult(out, manifest_path(out), plan.seconds, plan.size, plan.version, chosen, manifest, warnings)


def graph_of(source: Path) -> onnx.ModelProto:
    """The model at `source` without its external data.

    Raises:
        ModelError: no such file, an engine, or not an ONNX model.
    """
    if is_engine(source):
        raise ModelError(f"{source} is an engine, not an ONNX model; give the ONNX file that it was built from")
    return read_proto(source, weights=False)


@contextlib.contextmanager
def scratch(out: Path) -> Generator[Path]:
    """A folder beside `out` (so that renaming works), gone afterwards."""
    if not out.parent.is_dir():
        raise UsageError(f"the folder {out.parent} does not exist; make it or choose another place for the engine")
    if out.is_dir():
        raise UsageError(f"the engine {out} is a folder; name a file")
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise UsageError(f"cannot write into {out.parent}: {error.strerror or error}; choose another place") from error
    with folder as name:
        yield Path(name)


def _cache_copy(options: BuildOptions, folder: Path) -> BuildOptions:
    """The same options with a copy of the timing cache, which the builder may leave half-written."""
    if options.timing_cache is None:
        return options
    copy = folder / "timing.cache"
    if options.timing_cache.is_file():
        copy.write_bytes(options.timing_cache.read_bytes())
    return replace(options, timing_cache=copy)


def _keep_cache(options: BuildOptions, used: BuildOptions) -> tuple[str, ...]:
    """Put the timing cache that the build left in its place; a warning if that fails (the engine is worth more)."""
    if options.timing_cache is None or used.timing_cache is None:
        return ()
    try:
        write_atomic(options.timing_cache, used.timing_cache.read_bytes())
    except OSError as error:
        return (f"the timing cache {options.timing_cache} was not updated: {error.strerror or error}",)
    return ()
