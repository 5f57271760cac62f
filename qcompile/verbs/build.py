"""From a Q/DQ model to an engine whose kernels are known: build, audit, refit, and write it down."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from qcompile.backend.audit import AuditResult, audit
from qcompile.backend.bisect import bisect
from qcompile.backend.device import local_gpu
from qcompile.backend.manifest import write_manifest
from qcompile.backend.options import DEFAULTS, BuildOptions, require_options
from qcompile.backend.process import ENGINES, require_trt
from qcompile.backend.profile import Profile, parse_profile
from qcompile.backend.refit import refit_engine
from qcompile.backend.tensorrt import BuildResult, build_engine, capability, graph_of
from qcompile.errors import BackendError, BuildError, GateError, UsageError
from qcompile.report import SCHEMA_VERSION, Note, Progress, warned
from qcompile.target.catalog import DEFAULT, TARGETS, engine_targets
from qcompile.target.check import check
from qcompile.verbs.compile.options import DEFAULT_GPU, EngineOptions
from qcompile.verbs.guards import require_place
from qcompile.verbs.libraries import PluginOptions, load_libraries
from qcompile.verbs.options import Written, part


@dataclass(frozen=True, kw_only=True)
class EngineBuildOptions(BuildOptions, EngineOptions):
    """The engine."""

    output: Annotated[Path, "The engine; its manifest goes beside it.", Written("OUT.engine", short="-o")]
    target: Annotated[
        str | None, f"Default: what the model was compiled for, else {DEFAULT}.", Written(choices=tuple(engine_targets()))
    ] = None
    no_bisect: Annotated[bool, "If the builder refuses MODEL, do not search for the Q/DQ pairs that break it."] = False


@dataclass(frozen=True, kw_only=True)
class AuditOptions(PluginOptions):
    """What is audited."""

    gpu: Annotated[str, "The GPU to build for; none is needed here.", Written("SM")] = DEFAULT_GPU
    target: Annotated[str, "trt needs the tensorrt package and a GPU.", Written(choices=tuple(engine_targets()))] = "rtx"
    profile: Annotated[
        str | None, "Of dynamic inputs, e.g. 'x:1x3x32x32,8x3x32x32,32x3x32x32' (min, opt, max).", Written("SHAPES")
    ] = None
    min_share: Annotated[float | None, "Fail (exit 1) if the share is lower.", Written("X", least=0, most=1)] = None


@dataclass(frozen=True, kw_only=True)
class RefitOptions:
    """What is refitted."""

    weights: Annotated[Path, "An ONNX model of the structure that ENGINE was built from.", Written("MODEL")]
    output: Annotated[Path, "The engine with these weights; its manifest goes beside it.", Written("OUT.engine", short="-o")]


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


@dataclass(frozen=True)
class Refitted:
    """An engine with other weights."""

    engine: Path
    manifest: Path
    weights: Path

    def to_json(self) -> dict[str, Any]:
        """`schema_version, engine, manifest, size, weights`."""
        shown = {name: str(path) for name, path in vars(self).items()}
        return {"schema_version": SCHEMA_VERSION, **shown, "size": self.engine.stat().st_size}


def build(model: Path, options: EngineBuildOptions, progress: Progress) -> EngineResult:
    """Build the engine that `options` ask for (see `require_engine`, `make_engine`)."""
    load_libraries(options)
    gpus, profiles, chosen = gpu_list(options.gpu), profiles_from(options.profiles), part(options, BuildOptions)
    target = options.target or recorded_target(model, engine_targets())
    require_place(options.output, "the engine", [model])
    require_place(options.timing_cache, "the timing cache", [model, options.output])
    require_engine(target, options.output, gpus, options=chosen)
    return make_engine(
        model,
        options.output,
        target=target,
        gpus=gpus,
        profiles=profiles,
        options=chosen,
        find_cause=not options.no_bisect,
        note=progress.note,
    )


def audit_model(model: Path, options: AuditOptions) -> AuditResult:
    """Which kernels `model` gets (see `qcompile.backend.audit.audit`)."""
    load_libraries(options)
    profile = None if options.profile is None else parse_profile(options.profile)
    return audit(model, gpu_list(options.gpu)[0], profile, options.target)


def require_share(result: AuditResult, minimum: float | None) -> None:
    """Raises GateError where less than `minimum` of the planned work runs in low precision."""
    if minimum is not None and (result.share is None or result.share < minimum):
        raise GateError(
            f"the share is {result.share}, below --min-share {minimum:g}; look at the nodes that run in float, or lower it"
        )


def refit(engine: Path, options: RefitOptions) -> Refitted:
    """`engine` with other weights (see `refit_engine`).

    Raises:
        UsageError: the output cannot be written, or is one of the inputs.
    """
    require_place(options.output, "the engine", [engine, options.weights])
    return Refitted(options.output, refit_engine(engine, options.weights, options.output), options.weights)


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
        warned(built.warnings, note)
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
