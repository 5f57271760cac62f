"""From a Q/DQ model to an engine whose kernels are known: build, audit, and write both down."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.backend.audit import AuditResult, audit
from qcompile.backend.profile import Profile, parse_profile
from qcompile.backend.tensorrt import BuildResult, build_engine, capability, require_trt, write_manifest
from qcompile.errors import BackendError, UsageError
from qcompile.report import SCHEMA_VERSION
from qcompile.target.catalog import TARGETS
from qcompile.target.findings import Finding
from qcompile.target.rules import check
from qcompile.target.view import load_graph_only

__all__ = [
    "DEFAULT_GPU",
    "EngineResult",
    "audit",
    "check_document",
    "gpu_list",
    "make_engine",
    "profile_from",
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


def recorded_target(model: Path, choices: Collection[str], default: str = "trt") -> str:
    """The target that `model` was compiled for if it is one of `choices`, else `default`."""
    props = {p.key: p.value for p in load_graph_only(model).metadata_props}
    recorded = props.get("qcompile.target", "")
    return recorded if recorded in choices else default


def check_document(model: Path, target: str, gpus: Sequence[str] = ()) -> dict[str, Any]:
    """The rule checker's findings: `schema_version, target, errors, warnings` of `rule, node, message, fix`."""
    found = check(model, target, gpus)
    errors, warnings = ([_finding(f) for f in found if f.severity == s] for s in ("error", "warning"))
    return {"schema_version": SCHEMA_VERSION, "target": target, "errors": errors, "warnings": warnings}


def _finding(f: Finding) -> dict[str, str]:
    return {"rule": f.rule, "node": f.node, "message": f.message, "fix": f.fix}


def profile_from(text: str | None) -> Profile | None:
    """The profile that the command line gave, if any (see `parse_profile`)."""
    return None if text is None else parse_profile(text)


def require_engine(target: str, out: Path, gpus: Sequence[str]) -> None:
    """Fail now, before hours of work, on what would fail at the build.

    Raises:
        UsageError: the target builds no engine, or the folder of `out` does not exist.
        BackendError: its package is not installed, or it has no such GPU.
    """
    require_trt(target)
    if not out.parent.is_dir():
        raise UsageError(f"the folder of the engine {out} does not exist; create it first, or choose another place")
    known = TARGETS[target].gpus
    unknown = [g for g in gpus if known and g not in known]
    if unknown:
        raise BackendError(f"target {target!r} cannot build for {', '.join(unknown)}; choose --gpu from {', '.join(known)}")


def make_engine(
    onnx_path: str | Path,
    out: str | Path,
    *,
    target: str,
    gpus: Sequence[str],
    profile: Profile | None = None,
    note: Note | None = None,
) -> EngineResult:
    """Build an engine; for `rtx` audit its kernels for every GPU and add the figures to the manifest.

    Raises:
        ModelError, UsageError, BackendError: see `build_engine` and `audit`.
    """
    built = build_engine(onnx_path, out, target=target, gpus=gpus, profiles=[profile] if profile else None, progress=note)
    audits = tuple(_audits(Path(onnx_path), gpus, profile, note)) if target == "rtx" else ()
    if audits:
        write_manifest(built.path, {**built.manifest, "audit": {a.gpu: a.summary() for a in audits}})
    return EngineResult(built, audits)


def _audits(path: Path, gpus: Sequence[str], profile: Profile | None, note: Note | None) -> list[AuditResult]:
    done: list[AuditResult] = []
    for gpu in gpus:
        if note is not None:
            note(f"auditing the kernels for {gpu}")
        done.append(audit(path, gpu, profile))
    return done
