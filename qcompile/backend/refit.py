"""New weights for a refittable engine (see `process` for why in a process of its own).  Needs a GPU.

Request: `module`, `engine`, `onnx`, `out` (paths).
Reply: `ok`, `version`, `errors`, and `missing`: names of weights that the ONNX file does not give.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from qcompile.backend.device import local_gpu
from qcompile.backend.manifest import manifest_path, read_manifest, sha256, write_manifest
from qcompile.backend.process import MODULES, ask_worker, collecting_logger, require_trt, serve
from qcompile.backend.runner import engine_target
from qcompile.backend.tensorrt import quoted, scratch
from qcompile.errors import BackendError

_WORKER = "qcompile.backend.refit"


def refit_engine(engine: Path, onnx_path: Path, out: Path) -> Path:
    """Write `engine` with the weights of `onnx_path` as `out`, with its manifest.

    The ONNX file must have the structure of the one that the engine was built from.  A stripped engine becomes whole.

    Raises:
        ModelError: `engine` is none.
        UsageError: the folder of `out` is missing or not writable.
        BackendError: no GPU, no backend, or the engine cannot be refitted with this file.
    """
    target = engine_target(engine)
    if local_gpu() is None:
        raise BackendError(f"refitting {engine.name} needs an NVIDIA GPU, and this machine has none; run it on the GPU machine")
    module = require_trt(target)
    with scratch(out) as folder:
        draft = folder / out.name
        request = {"module": module, "engine": str(engine), "onnx": str(onnx_path), "out": str(draft)}
        _raise_failure(ask_worker(_WORKER, request, target), engine, onnx_path, MODULES[target])
        weights = {"file": onnx_path.name, "sha256": sha256(onnx_path)}
        made = {"sha256": sha256(draft), "size": draft.stat().st_size, "header": None}
        write_manifest(out, {**read_manifest(engine), "engine": made, "refitted_from": weights})
        os.replace(draft, out)
    return manifest_path(out)


def _raise_failure(reply: dict[str, Any], engine: Path, onnx_path: Path, module: str) -> None:
    if reply["ok"]:
        return
    missing = f" (it lacks {', '.join(reply['missing'][:4])})" if reply.get("missing") else ""
    raise BackendError(
        f"{module} cannot refit {engine.name} with {onnx_path.name}{missing}: {quoted(reply['errors'])}; the engine must be built"
        " with --refit or --strip, from a model of the same structure"
    )


def refit(request: dict[str, Any], reply: dict[str, Any]) -> None:
    """Refit in this process; fills `reply`.  Raises whatever TensorRT raises."""
    trt = importlib.import_module(request["module"])
    logger = collecting_logger(trt)
    reply["version"], reply["errors"] = trt.__version__, logger.errors
    engine = trt.Runtime(logger).deserialize_cuda_engine(Path(request["engine"]).read_bytes())
    if engine is None:  # the logger holds the reason
        return
    refitter = trt.Refitter(engine, logger)
    parsed = trt.OnnxParserRefitter(refitter, logger).refit_from_file(request["onnx"])
    reply["missing"] = list(refitter.get_missing_weights())
    if not parsed or reply["missing"] or not refitter.refit_cuda_engine():
        return
    Path(request["out"]).write_bytes(whole(trt, engine))
    reply["ok"] = True


def whole(trt: Any, engine: Any) -> bytes:
    """The engine with its weights (a stripped engine is serialized without them by default)."""
    config = engine.create_serialization_config()
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    return bytes(engine.serialize_with_config(config))


def main() -> int:
    """Serve one request."""
    return serve(refit, {"ok": False, "version": "", "errors": []})


if __name__ == "__main__":
    raise SystemExit(main())
