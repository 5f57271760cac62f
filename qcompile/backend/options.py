"""Build options beyond shapes and GPUs, and which of them TensorRT-RTX cannot take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from qcompile.backend.device import local_gpu
from qcompile.backend.process import ENGINES
from qcompile.errors import BackendError

Hardware = Literal["ampere+", "same-cc"]
_RTX_HAS_NONE = {
    "timing_cache": "TensorRT-RTX has no timing cache (kernels are compiled where the engine first runs); drop --timing-cache",
    "version_compatible": "TensorRT-RTX ships no lean runtime, an engine needs the version that built it;"
    " drop --version-compatible",
    "hardware_compatible": "a TensorRT-RTX engine runs on the GPUs that it names; write --gpu sm86,sm89 in place of"
    " --hardware-compatible",
}


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    The timing cache is written after the build; stripped weights are those that the ONNX file holds.
    """

    timing_cache: Annotated[Path | None, "Read and updated: later builds are faster (trt)."] = None
    version_compatible: Annotated[bool, "Later TensorRT versions load the engine too (trt)."] = False
    hardware_compatible: Annotated[
        Hardware | None, "Run on every GPU from Ampere on, or of the same compute capability (trt)."
    ] = None
    strip: Annotated[bool, "Leave the weights out; qcompile refit puts them back before it runs (needs a GPU)."] = False
    refit: Annotated[bool, "Let qcompile refit exchange the weights later (needs a GPU)."] = False

    @property
    def chosen(self) -> tuple[str, ...]:
        """Names of the options that differ from the default."""
        return tuple(name for name, value in vars(self).items() if value)

    @property
    def flags(self) -> tuple[str, ...]:
        """TensorRT's names of the builder flags; a stripped plan is always refittable."""
        wanted = {"VERSION_COMPATIBLE": self.version_compatible, "STRIP_PLAN": self.strip, "REFIT": self.refit or self.strip}
        return ("STRONGLY_TYPED", *(flag for flag, on in wanted.items() if on))

    def to_json(self) -> dict[str, Any]:
        """Every option by name; the timing cache by its file name."""
        return {**vars(self), "timing_cache": None if self.timing_cache is None else self.timing_cache.name}


DEFAULTS = BuildOptions()


def require_options(target: str, options: BuildOptions) -> None:
    """Refuse what the backend is known not to have, before any work.

    What only some versions lack is found by the worker, which asks the module itself.

    Raises:
        BackendError: naming the option.
    """
    if not ENGINES[target].rtx:
        return
    refused = next((_RTX_HAS_NONE[name] for name in options.chosen if name in _RTX_HAS_NONE), None)
    if refused is not None:
        raise BackendError(refused)
    if (options.strip or options.refit) and local_gpu() is None:
        what = "--strip" if options.strip else "--refit"
        raise BackendError(
            f"TensorRT-RTX builds stripped and refittable engines with CUDA calls, and this machine has no GPU; drop {what},"
            " or build on the GPU machine"
        )
