"""One TensorRT build in a process of its own: a JSON request on stdin, a JSON reply on stdout.

Polygraphy chooses between `tensorrt` and `tensorrt_rtx` by an environment variable that it reads at import, and
the builder writes to the process's standard output and may abort the process: both are reasons for a subprocess.

Request: `onnx`, `out` (path or null: build without saving), `rtx` (bool), `capabilities` ([[8, 9], ...]; empty =
the GPU of this machine), `profiles` ([{input: [min, opt, max]}]), `layers` (bool: return the kernel dump).
Reply: `ok`, `version`, `errors` (messages, last one last), `capabilities` (what the module knows), `unknown`
(asked for but not known), and on success `seconds`, `size`, `layers`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from typing import Any, TextIO

LAYER_DUMP = "Layers:"


def reply_stream() -> TextIO:
    """The real stdout, after file descriptor 1 is pointed at stderr so that no library can write into the reply."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def collecting_logger(trt: Any) -> Any:
    """A `trt.ILogger` that keeps errors and the kernel dump, and drops the rest."""

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)
            elif msg.startswith(LAYER_DUMP):
                self.layers += msg

    return Collector()


def builder_config(trt: Any, request: dict[str, Any]) -> Any:
    """Polygraphy's config functor for `request`."""
    from polygraphy.backend.trt import CreateConfig, Profile

    profiles: list[Any] = []
    for shapes in request["profiles"]:
        profile = Profile()
        for name, (lo, opt, hi) in shapes.items():
            profile.add(name, min=tuple(lo), opt=tuple(opt), max=tuple(hi))
        profiles.append(profile)
    options: dict[str, Any] = {"profiles": profiles or None, "profiling_verbosity": trt.ProfilingVerbosity.DETAILED}
    if not request["rtx"]:
        return CreateConfig(**options)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    return CreateConfigRTX(compute_capabilities=[tuple(c) for c in request["capabilities"]] or None, **options)


def build(request: dict[str, Any], reply: dict[str, Any]) -> None:
    """Build the engine of `request`; fills `reply`.  Raises whatever the builder raises."""
    import polygraphy.backend.trt.util as trt_util
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath

    trt = __import__("tensorrt_rtx" if request["rtx"] else "tensorrt")
    logger = collecting_logger(trt)
    trt_util.TRT_LOGGER = logger
    reply["version"] = trt.__version__
    reply["capabilities"] = list(trt.ComputeCapability.__members__) if request["rtx"] else []
    reply["errors"] = logger.errors
    unknown = [f"SM{a}{b}" for a, b in request["capabilities"] if f"SM{a}{b}" not in reply["capabilities"]]
    if request["rtx"] and unknown:
        reply["unknown"] = unknown
        return
    start = time.perf_counter()
    network = NetworkFromOnnxPath(request["onnx"], strongly_typed=True)
    engine = bytes(EngineBytesFromNetwork(network, config=builder_config(trt, request))())
    reply.update(ok=True, seconds=time.perf_counter() - start, size=len(engine))
    reply["layers"] = logger.layers if request["layers"] else ""
    if request["out"]:
        with open(request["out"], "wb") as file:
            file.write(engine)
            file.flush()
            os.fsync(file.fileno())


def main() -> int:
    """Serve one request; the exit status is 0 whenever a reply was written."""
    stream = reply_stream()
    request = json.load(sys.stdin)
    reply: dict[str, Any] = {"ok": False, "version": "", "errors": [], "capabilities": []}
    try:
        build(request, reply)
    except Exception as error:
        reply["errors"] = [*reply["errors"], f"{type(error).__name__}: {error}"]
    with contextlib.closing(stream):
        json.dump(reply, stream)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
