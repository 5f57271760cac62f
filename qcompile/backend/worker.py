"""One TensorRT build (see `process` for why it runs by itself).

Request: `module` (tensorrt or tensorrt_rtx), `onnx`, `out` (path or null: build without saving), `rtx` (bool),
`capabilities` ([[8, 9], ...]; empty = the GPU of this machine), `profiles` ([{input: [min, opt, max]}]), `layers`
(bool: return the kernel dump), `options` (`BuildOptions` by name; `timing_cache` is read if it exists, and written).
Reply: `ok`, `version`, `errors` (messages, last one last), `capabilities` (what the module knows), `unknown`
(asked for but not known), `unsupported` (options that the module lacks), `unwritable` (why the engine cannot be
written), and on success `seconds`, `size`, `layers`, `header`.
"""

from __future__ import annotations

import importlib
import os
import time
from typing import Any

from qcompile.backend.process import collecting_logger, serve

LAYER_DUMP = "Layers:"
HARDWARE = {"ampere+": "AMPERE_PLUS", "same-cc": "SAME_COMPUTE_CAPABILITY"}
FLAGS = {"version_compatible": "VERSION_COMPATIBLE", "strip": "STRIP_PLAN", "refit": "REFIT"}


def unsupported(trt: Any, options: dict[str, Any]) -> list[str]:
    """The names of the asked-for `options` that the module `trt` has no switch for."""
    lacking = [name for name, flag in FLAGS.items() if options[name] and not hasattr(trt.BuilderFlag, flag)]
    if options["hardware_compatible"] and not hasattr(_hardware_levels(trt), HARDWARE[options["hardware_compatible"]]):
        lacking.append("hardware_compatible")
    if options["timing_cache"] and not hasattr(trt.IBuilderConfig, "create_timing_cache"):
        lacking.append("timing_cache")
    return lacking


def _hardware_levels(trt: Any) -> Any:
    return getattr(trt, "HardwareCompatibilityLevel", None)


def config_options(trt: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Polygraphy's keyword arguments for `options`, those that are off left out."""
    chosen: dict[str, Any] = {"profiling_verbosity": trt.ProfilingVerbosity.DETAILED}
    if options["version_compatible"]:
        chosen["version_compatible"] = True
    if options["hardware_compatible"]:
        chosen["hardware_compatibility_level"] = getattr(_hardware_levels(trt), HARDWARE[options["hardware_compatible"]])
    if options["strip"]:
        chosen["strip_plan"] = True
    if options["refit"] or options["strip"]:
        chosen["refittable"] = True
    if options["timing_cache"] and os.path.exists(options["timing_cache"]):
        chosen["load_timing_cache"] = options["timing_cache"]
    return chosen


def builder_config(trt: Any, request: dict[str, Any]) -> Any:
    """Polygraphy's config functor for `request`."""
    from polygraphy.backend.trt import CreateConfig, Profile

    profiles: list[Any] = []
    for shapes in request["profiles"]:
        profile = Profile()
        for name, (lo, opt, hi) in shapes.items():
            profile.add(name, min=tuple(lo), opt=tuple(opt), max=tuple(hi))
        profiles.append(profile)
    options = {"profiles": profiles or None, **config_options(trt, request["options"])}
    if not request["rtx"]:
        return CreateConfig(**options)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    return CreateConfigRTX(compute_capabilities=[tuple(c) for c in request["capabilities"]] or None, **options)


def header_state(trt: Any, engine: bytes) -> str | None:
    """What the runtime says of the engine's header: `valid`, `suboptimal`, the reasons why not, or `well-formed`
    (it can be read, but there is no GPU to compare it with); None where the runtime has no such check."""
    if not hasattr(trt.Runtime, "get_engine_validity"):
        return None
    state, reasons = trt.Runtime(collecting_logger(trt)).get_engine_validity(engine)
    if state != trt.EngineValidity.INVALID:
        return str(state.name).lower()
    named = [n for n, bit in trt.EngineInvalidityDiagnostics.__members__.items() if int(reasons) & int(bit)]
    return ", ".join(n.lower() for n in named) if set(named) - {"CUDA_ERROR"} else "well-formed"


def build(request: dict[str, Any], reply: dict[str, Any]) -> None:
    """Build the engine of `request`; fills `reply`.  Raises whatever the builder raises."""
    import polygraphy.backend.trt.util as trt_util

    trt = importlib.import_module(request["module"])
    logger = collecting_logger(trt, keep=LAYER_DUMP)
    trt_util.TRT_LOGGER = logger
    reply["version"] = trt.__version__
    reply["capabilities"] = list(trt.ComputeCapability.__members__) if request["rtx"] else []
    reply["errors"] = logger.errors
    reply["unsupported"] = unsupported(trt, request["options"])
    unknown = [f"SM{a}{b}" for a, b in request["capabilities"] if f"SM{a}{b}" not in reply["capabilities"]]
    reply["unknown"] = unknown if request["rtx"] else []
    if reply["unknown"] or reply["unsupported"]:
        return
    start = time.perf_counter()
    engine = _serialized(trt, request)
    reply.update(ok=True, seconds=time.perf_counter() - start, size=len(engine))
    reply["layers"] = logger.layers if request["layers"] else ""
    if request["out"]:
        reply["header"] = header_state(trt, engine)
        _write(request["out"], engine, reply)


def _serialized(trt: Any, request: dict[str, Any]) -> bytes:
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath

    network = NetworkFromOnnxPath(request["onnx"], strongly_typed=True)
    cache = request["options"]["timing_cache"]
    return bytes(EngineBytesFromNetwork(network, config=builder_config(trt, request), save_timing_cache=cache)())


def _write(path: str, engine: bytes, reply: dict[str, Any]) -> None:
    try:
        with open(path, "wb") as file:
            file.write(engine)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reply.update(ok=False, unwritable=error.strerror or str(error))


def main() -> int:
    """Serve one request."""
    return serve(build, {"ok": False, "version": "", "errors": [], "capabilities": []})


if __name__ == "__main__":
    raise SystemExit(main())
