"""The file that is served: an ONNX model, or a plan with its manifest and the model that it was built from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.backend.manifest import is_engine, read_manifest
from qcompile.backend.profile import Profile, ShapeRange
from qcompile.backend.triton import Backend
from qcompile.errors import BackendError, ModelError, UsageError
from qcompile.target.catalog import TARGETS
from qcompile.verbs.deploy.options import DeployOptions


@dataclass(frozen=True)
class Source:
    """The file to serve, the ONNX model that says what its interface is, and for a plan its manifest."""

    file: Path
    onnx: Path
    backend: Backend
    manifest: dict[str, Any]
    profiles: tuple[Profile, ...]


def source_of(model: Path, options: DeployOptions) -> Source:
    """The file at `model`, with what it was made from.

    Raises:
        UsageError: options that do not belong to such a file.
        ModelError: it is not there, or its manifest or its ONNX model is not.
        BackendError: an engine that Triton does not load.
    """
    if not model.is_file():
        raise ModelError(f"no model at {model}: check the path")
    if not is_engine(model):
        return _onnx_source(model, options)
    manifest = read_manifest(model)
    if "engine" not in manifest:
        raise ModelError(f"{model} is an engine without its manifest {model.name}.json; build it with qcompile build")
    return _plan_source(model, manifest, options)


def _onnx_source(model: Path, options: DeployOptions) -> Source:
    if options.backend == "tensorrt":
        raise UsageError("--backend tensorrt serves a plan: build one first (qcompile build --target trt), and give its engine")
    if options.onnx is not None:
        raise UsageError("--onnx belongs to an engine, and this is an ONNX model; drop it")
    return Source(model, model, "onnxruntime", {}, ())


def _plan_source(engine: Path, manifest: dict[str, Any], options: DeployOptions) -> Source:
    onnx_path = options.onnx or engine.with_name(str(manifest.get("onnx", {}).get("file", "")))
    served = {t.name for t in TARGETS.values() if t.engine is not None and t.engine.served}
    if manifest.get("target") not in served:
        raise BackendError(
            f"{engine} is an engine of {manifest.get('backend')}, and Triton's tensorrt backend loads TensorRT plans only; "
            "build one with --target trt on the GPU machine, or serve the ONNX model: "
            f"qcompile deploy {onnx_path.name} --accelerator tensorrt"
        )
    if options.backend == "onnxruntime" or options.accelerator:
        raise UsageError("an engine is served by the tensorrt backend; drop --backend and --accelerator, or give the ONNX model")
    if options.reference is not None or options.min_sqnr is not None:
        raise UsageError(
            "--reference and --min-sqnr run the model, and an engine runs on its GPU only: qcompile bench compares it there"
        )
    if not onnx_path.is_file():
        raise ModelError(f"the ONNX model {onnx_path} that {engine.name} was built from is not there; name it with --onnx")
    return Source(engine, onnx_path, "tensorrt", manifest, tuple(_profile(p) for p in manifest.get("profiles", [])))


def _profile(document: dict[str, Any]) -> Profile:
    shapes = {name: ShapeRange(*(tuple(s) for s in three)) for name, three in document["shapes"].items()}
    return Profile(shapes, document.get("source", "given"))
