"""Many small TensorRT-RTX builds, each in a fork of one process that has loaded the libraries.

A fork survives crashes of the builder, and keeps builds apart: in one process an earlier build can change the kernels of
a later one (seen: an int8 convolution for sm75 after 200 builds, float in a process of its own).
As a module it is the worker: paths and compute capabilities as JSON lines on stdin, replies as JSON lines on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from qcompile.backend.audit import AuditedNode, audited_nodes
from qcompile.backend.dump import parse_dump
from qcompile.backend.process import collecting_logger
from qcompile.backend.worker import LAYER_DUMP
from qcompile.target.view import GraphView
from tests.target.matrix import Outcome

HANG_S = 120


@dataclass(frozen=True)
class Built:
    """What became of one build: `layers` is the kernel dump, `errors` the builder's messages."""

    ok: bool
    errors: tuple[str, ...] = ()
    layers: str = ""
    version: str = ""


def build_all(models: Sequence[tuple[onnx.ModelProto, str]], folder: Path) -> list[Built]:
    """Build each (model, gpu) with fixed shapes; one that kills the builder is `Built(False, ("crashed",))`."""
    jobs: list[dict[str, str]] = []
    for i, (model, gpu) in enumerate(models):
        onnx.save(model, str(folder / f"{i}.onnx"))
        jobs.append({"onnx": str(folder / f"{i}.onnx"), "gpu": gpu})
    finished = subprocess.run(
        [sys.executable, "-m", "tests.target.builds"],
        input="".join(json.dumps(job) + "\n" for job in jobs),
        capture_output=True,
        text=True,
        env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        check=True,
        cwd=Path(__file__).parents[2],
        timeout=HANG_S + 2 * len(jobs),
    )
    replies = [json.loads(line) for line in finished.stdout.splitlines()]
    return [Built(r["ok"], tuple(r["errors"]), r["layers"], r["version"]) for r in replies]


def audited(model: onnx.ModelProto, built: Built) -> tuple[AuditedNode, ...]:
    """The work items of a built model with their kernels."""
    return audited_nodes(GraphView.open(model), parse_dump(built.layers).kernels, None)


def outcome(model: onnx.ModelProto, built: Built) -> Outcome:
    """What the builder made of all work items together."""
    if not built.ok:
        return "refused"
    nodes = audited(model, built)
    if all(n.reads is not None for n in nodes):
        return "low"
    operands = [x.dtype for n in nodes for k in n.kernels for x in (*k.inputs, *k.constants)]
    return "packed" if "Int4" in operands else "float"


def _build(trt: Any, job: dict[str, str]) -> dict[str, Any]:
    import polygraphy.backend.trt.util as trt_util
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath

    logger = collecting_logger(trt, keep=LAYER_DUMP)
    trt_util.TRT_LOGGER = logger
    capability = int(job["gpu"][2:-1]), int(job["gpu"][-1])
    config = CreateConfigRTX(compute_capabilities=[capability], profiling_verbosity=trt.ProfilingVerbosity.DETAILED)
    try:
        EngineBytesFromNetwork(NetworkFromOnnxPath(job["onnx"], strongly_typed=True), config=config)()
    except Exception as error:
        return {"ok": False, "errors": [*logger.errors, f"{type(error).__name__}: {error}"], "layers": ""}
    return {"ok": True, "errors": logger.errors, "layers": logger.layers}


def _forked(trt: Any, job: dict[str, str]) -> dict[str, Any]:
    """The reply of a child process; "crashed" if it dies without one."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(send, "w", encoding="utf-8") as stream:
            json.dump(_build(trt, job), stream)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, encoding="utf-8") as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"ok": False, "errors": ["crashed"], "layers": ""}


def main() -> None:
    """Serve until stdin ends."""
    import polygraphy.backend.tensorrt_rtx
    import polygraphy.backend.trt  # noqa: F401  (loaded once, before the forks)
    import tensorrt_rtx as trt

    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the builder writes to file descriptor 1
    for line in sys.stdin:
        reply = _forked(trt, json.loads(line))
        print(json.dumps(reply | {"version": trt.__version__}), file=stream, flush=True)


if __name__ == "__main__":
    main()
