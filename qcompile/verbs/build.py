"""From a Q/DQ model to an engine whose kernels are known: build, audit, and write both down."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.backend.audit import AuditResult, audit
from qcompile.backend.bisect import bisect
from qcompile.backend.device import local_gpu
from qcompile.backend.manifest import write_manifest
from qcompile.backend.options import DEFAULTS, BuildOptions, Hardware, require_options
from qcompile.backend.process import ENGINES, require_trt
from qcompile.backend.profile import Profile, parse_profile
from qcompile.backend.tensorrt import BuildResult, build_engine, capability, graph_of
from qcompile.errors import BackendError, BuildError, UsageError
from qcompile.report import SCHEMA_VERSION
from qcompile.target.catalog import DEFAULT, TARGETS, engine_targets
from qcompile.target.check import check

__all__ = [
    "DEFAULT_GPU",
    "BuildOptions",
    "EngineResult",
    "Hardware",
    "audit",
    "engine_targets",
    "gpu_list",
    "make_engine",
    "profile_from",
    "profiles_from",
    "recorded_target",
    "require_engine",
]

DEFAULT_GPU = "sm89"
Note = Callable[[str], None]


@dataclass(frozen=True)
class EngineResult:
    """A built engine, and one audit for each GPU that it was built for (none for target `trt`)."""

    build: BuildResult
    audits: tuple[AuditResult, ...]

    def to_json(self) -> dict[str, Any]:
        """The build document: path, size in bytes, seconds, the manifest, and the audits' figures by GPU."""
        return {
            "schema_version": SCHEMA_VERSION,
            "engine": str(self.build.path),
            "manifest": str(self.build.manifest_path),
            "size": self.build.size,
            "seconds": self.build.seconds,
            "version": self.build.version,
            "profiles": [{"shapes": p.to_json(), "source": p.source} for p in self.build.profiles],
            "options": self.build.manifest["options"],
            "warnings": list(self.build.warnings),
            "audits": {a.gpu: a.summary() for a in self.audits},
        }


def gpu_list(text: str) -> tuple[str, ...]:
    """`sm86,sm89` -> names, each of the right form.

    Raises:
        UsageError: a name is not sm and a compute capability, or there is none.
    """
    gpus = tuple(g.strip().lower() for g in text.split(",") if g.strip())
    for gpu in gpus:
        capability(gpu)
    if not gpus:
        raise UsageError("--gpu names no GPU; write sm and the compute capability, e.g. --gpu sm89")
    return gpus


def recorded_target(model: Path, choices: Collection[str], default: str = DEFAULT) -> str:
    """The target that `model` was compiled for if it is one of `choices`, else `default`."""
    props = {p.key: p.value for p in graph_of(model).metadata_props}
    recorded = props.get("qcompile.target", "")
    return recorded if recorded in choices else default


def profile_from(text: str | None) -> Profile | None:
    """The profile that the command line gave, if any (see `parse_profile`)."""
    return None if text is None else parse_profile(text)


def profiles_from(texts: Sequence[str]) -> tuple[Profile, ...]:
    """One profile for each `--profile` (see `parse_profile`)."""
    return tuple(parse_profile(text) for text in texts)


def require_engine(
    target: str, out: Path, gpus: Sequence[str], codes: Collection[str] = (), options: BuildOptions = DEFAULTS
) -> None:
    """Fail now, before hours of work, on what would fail at the build.

    `codes` are the code types that the model will hold, e.g. float8e4m3fn.

    Raises:
        UsageError: the target builds no engine, or the folder of `out` does not exist.
        BackendError: its package is not installed, it has no such GPU or no such option, or a GPU has no such kernels.
    """
    require_trt(target)
    require_options(target, options)
    engine = ENGINES[target]
    if not out.parent.is_dir():
        raise UsageError(f"the folder of the engine {out} does not exist; create it first, or choose another place")
    if not engine.named_gpus and local_gpu() is None:
        raise BackendError(
            f"target {target!r} builds for this machine's GPU, and there is none; use --target rtx, or the GPU machine"
        )
    known = TARGETS[target].gpus
    unknown = [g for g in gpus if known and g not in known]
    if unknown and engine.named_gpus:
        raise BackendError(f"target {target!r} cannot build for {', '.join(unknown)}; choose --gpu from {', '.join(known)}")
    pairs = ((g, c) for g in _built_for(target, gpus) for c in codes)
    lacking = next(((g, c) for g, c in pairs if _number(g) < TARGETS[target].capability(c)), None)
    if lacking is not None:
        raise BackendError(_lacks(target, *lacking))


def _built_for(target: str, gpus: Sequence[str]) -> Sequence[str]:
    """The GPUs that the engine is for: those asked for, or with `trt` this machine's."""
    own = local_gpu()
    return gpus if ENGINES[target].named_gpus else ((own,) if own is not None else ())


def _number(gpu: str) -> int:
    major, minor = capability(gpu)
    return 10 * major + minor


def _lacks(target: str, gpu: str, code: str) -> str:
    lowest = TARGETS[target].capability(code)
    return f"{gpu} has no {code} kernels (they begin with sm{lowest}); choose --gpu sm{lowest} or newer, or another scheme"


def make_engine(
    onnx_path: str | Path,
    out: str | Path,
    *,
    target: str,
    gpus: Sequence[str],
    profiles: Sequence[Profile] = (),
    options: BuildOptions = DEFAULTS,
    find_cause: bool = True,
    note: Note | None = None,
) -> EngineResult:
    """Build an engine; for `rtx` audit its kernels for every GPU and add the figures to the manifest.

    `find_cause`: if the builder refuses the model, build parts of it until the Q/DQ pairs that break it are known.

    Raises:
        ModelError, UsageError, BackendError: see `build_engine` and `audit`.
        BuildError: with the builder's message, and the cause.
    """
    source = Path(onnx_path)
    _require_kernels(source, target, gpus)
    try:
        built = build_engine(source, out, target=target, gpus=gpus, profiles=profiles, options=options, progress=note)
    except BuildError as error:
        if not find_cause:
            raise
        raise BuildError(_with_cause(error, source, target, gpus, profiles, note)) from error
    if note is not None:
        for warning in built.warnings:
            note(f"warning: {warning}")
    audits = tuple(_audits(source, gpus, built.profiles, note)) if ENGINES[target].named_gpus else ()
    if audits:
        write_manifest(built.path, {**built.manifest, "audit": {a.gpu: a.summary() for a in audits}})
    return EngineResult(built, audits)


def _require_kernels(source: Path, target: str, gpus: Sequence[str]) -> None:
    """Refuse code types that a GPU has no kernels for (the builder would take minutes to say so, or emulate them)."""
    graph_of(source)
    found = check(source, target, _built_for(target, gpus))
    hopeless = {r.id for r in TARGETS[target].rules if r.before_build}
    refused = next((f for f in found if f.rule in hopeless), None)
    if refused is not None:
        raise BackendError(f"{source.name}: {refused.message}; {refused.fix}")


def _with_cause(
    error: BuildError, source: Path, target: str, gpus: Sequence[str], profiles: Sequence[Profile], note: Note | None
) -> str:
    said = str(error).removesuffix("; run `qcompile check` for the cause")
    if note is not None:
        note(f"the builder refused the model ({said}); looking for the Q/DQ pairs that break it (--no-bisect: do not)")
    found = bisect(source, said, target=target, gpus=gpus, profiles=profiles, progress=note)
    return f"{said}; {found.advice()}"


def _audits(path: Path, gpus: Sequence[str], profiles: Sequence[Profile], note: Note | None) -> list[AuditResult]:
    done: list[AuditResult] = []
    for gpu in gpus:
        if note is not None:
            note(f"auditing the kernels for {gpu}")
        done.append(audit(path, gpu, next(iter(profiles), None)))
    return done
