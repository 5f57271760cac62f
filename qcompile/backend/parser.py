"""Whether TensorRT's parser reads a model: a fraction of a second, where a build takes minutes (see `process` for the worker).

Request: `module` (tensorrt or tensorrt_rtx), `onnx`.  Reply: `ok`, `version`, `errors`.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from qcompile.backend.process import MODULES, ask_worker, collecting_logger, serve
from qcompile.backend.tensorrt import quoted


def can_parse(target: str) -> bool:
    """Whether the module that builds for `target` is here."""
    return target in MODULES and importlib.util.find_spec(MODULES[target]) is not None


def parse(onnx_path: Path, target: str) -> str:
    """Why the parser of `target` refuses the model at `onnx_path`; an empty string if it reads it.

    Raises:
        BackendError: the library does not load, or was killed.
        BuildError: it crashed.
    """
    reply = ask_worker(__name__, {"module": MODULES[target], "onnx": str(onnx_path)}, target)
    if not reply["version"]:
        return f"{MODULES[target]} does not load ({quoted(reply['errors'])})"
    return "" if reply["ok"] else f"{MODULES[target]} {reply['version']}: {quoted(reply['errors'])}"


def parse_here(request: dict[str, Any], reply: dict[str, Any]) -> None:
    """The worker's side of `parse`; fills `reply`."""
    trt = importlib.import_module(request["module"])
    logger = collecting_logger(trt)
    reply["errors"] = logger.errors
    reply["version"] = trt.__version__
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = trt.Builder(logger).create_network(typed)
    parser = trt.OnnxParser(network, logger)
    reply["ok"] = bool(parser.parse_from_file(request["onnx"]))
    if not reply["ok"] and not logger.errors:
        reply["errors"] = [parser.get_error(i).desc() for i in range(parser.num_errors)]


def main() -> int:
    """Serve one request."""
    return serve(parse_here, {"ok": False, "version": "", "errors": []})


if __name__ == "__main__":
    raise SystemExit(main())
