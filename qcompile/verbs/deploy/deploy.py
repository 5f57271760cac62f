"""`qcompile deploy`: a model or an engine into a Triton model repository, checked before it appears there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnx

from qcompile.backend.manifest import sha256
from qcompile.backend.pbtxt import to_text
from qcompile.backend.profile import Profile, ShapeRange, default_profile
from qcompile.backend.repository import publish, require_room, staging, tree, warmup_file, warmup_path, write_staged
from qcompile.backend.triton import (
    CONFIG,
    FILES,
    NUMPY_TYPES,
    WARMUP,
    Backend,
    Interface,
    Serving,
    WarmupFile,
    check_serving,
    choose_batch,
    config_text,
    interface_fields,
    interface_of,
    model_config,
)
from qcompile.calib.data import find_beside, load_data
from qcompile.calib.sweep.alone import suited
from qcompile.errors import BackendError, GateError, ModelError, UsageError
from qcompile.execute.feeds import Feeds
from qcompile.ir.model import Model
from qcompile.ir.reader import read_proto
from qcompile.report import SCHEMA_VERSION
from qcompile.target.view import GraphView
from qcompile.verbs.deploy.options import DEFAULT_SAMPLES, DeployOptions
from qcompile.verbs.deploy.parity import Parity, as_requested, check_served, requests_of
from qcompile.verbs.deploy.source import Source, source_of
from qcompile.verbs.libraries import load_libraries


@dataclass(frozen=True)
class Integrity:
    """The digest of what was written, and the file whose digest it equals; of a plan also the model that it was built from."""

    sha256: str
    same_as: str
    onnx: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """`sha256, same_as` and `onnx`."""
        source = {} if self.onnx is None else {"onnx": str(self.onnx)}
        return {"sha256": self.sha256, "same_as": self.same_as, **source}


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """What stands in the repository.

    `config` is the ModelConfig message; `warmup` are files; `parity` is None without data and for a plan.
    """

    repository: Path
    name: str
    version: int
    backend: Backend
    folder: Path
    files: tuple[str, ...]
    max_batch_size: int
    config: Mapping[str, Any]
    warmup: tuple[str, ...]
    data: str | None
    parity: Parity | None
    integrity: Integrity
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """`schema_version` and the fields (see `Parity.to_json`)."""
        parity = None if self.parity is None else self.parity.to_json()
        return {
            "schema_version": SCHEMA_VERSION, **vars(self), "repository": str(self.repository), "folder": str(self.folder),
            "parity": parity, "integrity": self.integrity.to_json(),
        }  # fmt: skip


@dataclass(frozen=True)
class Deployments:
    """One or more models."""

    models: tuple[Deployed, ...]

    def to_json(self) -> dict[str, Any]:
        """The document of the only model, or `schema_version, models`."""
        documents = [m.to_json() for m in self.models]
        return documents[0] if len(documents) == 1 else {"schema_version": SCHEMA_VERSION, "models": documents}


@dataclass(frozen=True)
class _Requests:
    """Feeds of the parity check; `warmup` is the first request as files."""

    feeds: tuple[Feeds, ...]
    warmup: tuple[WarmupFile, ...]
    source: str | None


def deploy_all(models: Sequence[Path], options: DeployOptions) -> Deployments:
    """Deploy each model.

    Raises:
        UsageError: one name for several models.
        QcompileError: see `deploy`.
    """
    if len(models) > 1 and options.name:
        raise UsageError("--name names one model; drop it, or deploy the models one by one")
    load_libraries(options)
    return Deployments(tuple(deploy(m, options) for m in models))


def deploy(model: str | Path, options: DeployOptions) -> Deployed:
    """Write NAME/config.pbtxt and NAME/VERSION/model.onnx (or model.plan) into the repository, all at once or not at all.

    An ONNX model is run before it appears (see `check_served`); a plan runs only on its GPU, so its digest is compared
    with its manifest, and its interface is that of the ONNX file which the manifest names.

    Raises:
        UsageError: options that contradict each other, the model, or what the repository holds.
        ModelError, DataError: the model or the data cannot be used.
        BackendError: a TensorRT-RTX engine, a plan that is not the one of its manifest, or an unwritable folder.
        GateError: the served file is not the model that was meant.
    """
    if options.labels is not None and not options.labels.is_file():
        raise UsageError(f"no labels at {options.labels}; name a file with one class a line")
    source, place = source_of(Path(model), options), options.triton
    proto = read_proto(source.onnx, weights=False)
    interface = interface_of(proto)
    serving = _serving(source, proto, interface, options)
    check_serving(serving)
    fields = to_text(interface_fields(interface, serving))
    require_room(place, serving.name, options.version, fields, options.replace)
    requests = _requests(source, interface, serving, options)
    config = model_config(interface, serving, requests.warmup) | _operations(options)
    with staging(place, serving.name) as staged:
        write_staged(staged, _contents(source, proto, options, config, requests.warmup))
        integrity = _integrity(source, proto, staged / str(options.version))
        parity = _parity(source, staged, config, requests, options)
        folder = publish(staged, place, options.version)
    return Deployed(
        repository=place,
        name=serving.name,
        version=options.version,
        backend=serving.backend,
        folder=folder,
        files=tuple(tree(folder)),
        max_batch_size=serving.max_batch,
        config=config,
        warmup=tuple(warmup_path(options.version, i) for i in range(len(requests.warmup))),
        data=requests.source,
        parity=parity,
        integrity=integrity,
        notes=tuple(_notes(source, serving, requests, parity)),
    )


def _operations(options: DeployOptions) -> dict[str, Any]:
    """The libraries that the server's ONNX Runtime loads, from where they lie here."""
    if not options.ort_library:
        return {}
    return {"model_operations": {"op_library_filename": [str(Path(p).resolve()) for p in options.ort_library]}}


# ---- what is served ------------------------------------------------------------------------------------------------


def _serving(source: Source, proto: onnx.ModelProto, interface: Interface, options: DeployOptions) -> Serving:
    batch = choose_batch(interface, options.max_batch, source.profiles)
    guessed = default_profile(proto) if options.accelerator else None
    return Serving(
        name=options.name or source.file.name.split(".")[0],
        backend=source.backend,
        max_batch=batch,
        preferred=options.preferred_batch,
        queue_delay_us=options.queue_delay_us,
        instances=options.instances,
        policy=options.policy,
        profiles=source.profiles if guessed is None else (_clamped(guessed, batch),),
        accelerator=options.accelerator,
        precision=_precision(proto) if options.accelerator else None,
        labels=None if options.labels is None else options.labels.name,
    )


def _clamped(profile: Profile, batch: int) -> Profile:
    """The profile with its batches no larger than the server's."""
    if not batch:
        return profile

    def cut(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (min(shape[0], batch), *shape[1:])

    shapes = {n: ShapeRange(cut(r.min), cut(r.opt), (batch, *r.max[1:])) for n, r in profile.shapes.items()}
    return Profile(shapes, profile.source)


def _precision(proto: onnx.ModelProto) -> Literal["INT8", "FP16"] | None:
    """The TensorRT execution provider's mode: it has to be told of int8 Q/DQ, and of a float16 body without."""
    view = GraphView.open(proto)
    if any(view.low_type(dq) == "int8" for dq in view.of_type("DequantizeLinear")):
        return "INT8"
    halves = any(t.data_type == onnx.TensorProto.FLOAT16 for t in proto.graph.initializer)
    return "FP16" if halves else None


def _contents(
    source: Source, proto: onnx.ModelProto, options: DeployOptions, config: dict[str, Any], warmup: Sequence[WarmupFile]
) -> dict[str, bytes | Path]:
    """{path in the model's folder: bytes, or the file to copy}."""
    version, contents = str(options.version), dict[str, bytes | Path]()
    contents[f"{version}/{FILES[source.backend]}"] = source.file
    if source.backend == "onnxruntime":
        contents |= {f"{version}/{name}": source.file.parent / name for name in _external(proto)}
    contents |= {f"{WARMUP}/{w.file}": w.data for w in warmup}
    if options.labels is not None:
        contents[options.labels.name] = options.labels
    return contents | {CONFIG: config_text(config).encode()}


def _external(proto: onnx.ModelProto) -> list[str]:
    return sorted({e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"})


# ---- requests ------------------------------------------------------------------------------------------------------


def _requests(source: Source, interface: Interface, serving: Serving, options: DeployOptions) -> _Requests:
    beside = next((d for m in (options.reference, source.onnx) if m is not None and (d := find_beside(m))), None)
    spec = options.data or beside
    if spec is None:
        return _Requests((), (), None)
    model = Model.load(source.onnx)
    inputs = model.inputs()
    data = suited(load_data(spec, inputs, options.preprocess, options.samples), model)
    if not options.samples:
        data = data.take(DEFAULT_SAMPLES)
    fixed = None if serving.max_batch else data.run_size(inputs)
    feeds = tuple(requests_of(data, serving.max_batch, fixed))
    return _Requests(feeds, _warmup(feeds[0], model_config(interface, serving), options.version), data.source)


def _warmup(feeds: Feeds, config: dict[str, Any], version: int) -> tuple[WarmupFile, ...]:
    typed = as_requested(feeds, config)
    first = {n: x[0] if config["max_batch_size"] else x for n, x in typed.items()}
    return tuple(
        WarmupFile(
            io["name"], str(io["data_type"]), first[io["name"]].shape or (1,), warmup_file(version, i), _raw(first[io["name"]])
        )
        for i, io in enumerate(config["input"])
    )


def _raw(array: np.ndarray[Any, Any]) -> bytes:
    """Row-major, little-endian."""
    little = array.dtype.newbyteorder("<") if array.dtype.kind in "iuf" else array.dtype
    return np.ascontiguousarray(array, little).tobytes()


def _read_back(staged: Path, config: dict[str, Any]) -> Feeds:
    """The warm-up request as Triton makes it from the files: raw bytes, the config's types and dims, a batch axis of 1."""
    files: dict[str, Any] = {i["key"]: i["value"] for i in config["model_warmup"][0]["inputs"]}
    feeds: Feeds = {}
    for io in config["input"]:
        entry = files[io["name"]]
        raw = (staged / WARMUP / entry["input_data_file"]).read_bytes()
        dims = [] if "reshape" in io else entry["dims"]
        shape = (1, *dims) if config["max_batch_size"] else tuple(dims)
        feeds[io["name"]] = np.frombuffer(raw, NUMPY_TYPES[entry["data_type"]]).reshape(shape)
    return feeds


# ---- checks --------------------------------------------------------------------------------------------------------


def _integrity(source: Source, proto: onnx.ModelProto, folder: Path) -> Integrity:
    """Digests of what was written against what was meant."""
    written = sha256(folder / FILES[source.backend])
    if source.backend == "onnxruntime":
        names = {FILES["onnxruntime"]: source.file, **{n: source.file.parent / n for n in _external(proto)}}
        if any(sha256(folder / n) != sha256(original) for n, original in names.items()):
            raise GateError(f"{source.file} changed while it was copied; nothing was deployed, run the command again")
        return Integrity(written, str(source.file))
    recorded = source.manifest
    if written != recorded["engine"]["sha256"]:
        raise BackendError(f"{source.file} is not the engine that its manifest describes (SHA-256 differs); build it again")
    if sha256(source.onnx) != recorded["onnx"]["sha256"]:
        raise ModelError(
            f"{source.onnx} is not the model that {source.file.name} was built from (SHA-256 differs); name it with --onnx"
        )
    return Integrity(written, f"{source.file.name}.json", source.onnx)


def _parity(source: Source, staged: Path, config: dict[str, Any], requests: _Requests, options: DeployOptions) -> Parity | None:
    if source.backend == "tensorrt" or not requests.feeds:
        if options.reference is not None or options.min_sqnr is not None:
            raise UsageError("--reference and --min-sqnr compare outputs: give requests with --data")
        return None
    _require_warmup(staged, config, requests.feeds[0])
    served = staged / str(options.version) / FILES[source.backend]
    parity = check_served(served, config, options.reference or source.file, requests.feeds, options.accelerator is not None)
    _gate(parity, options)
    return parity


def _require_warmup(staged: Path, config: dict[str, Any], first: Feeds) -> None:
    """What Triton makes of the warm-up files must be the first request."""
    read, meant = _read_back(staged, config), as_requested(first, config)
    if any(not np.array_equal(x, meant[n][: len(x)] if x.ndim else meant[n]) for n, x in read.items()):
        raise GateError("the warm-up files do not hold the first request; nothing was deployed; this is a bug, please report it")


def _gate(parity: Parity, options: DeployOptions) -> None:
    if options.reference is None and not parity.equal:
        raise GateError("the served file does not give the outputs of the file that it was copied from; nothing was deployed")
    if options.min_sqnr is not None and parity.sqnr_db < options.min_sqnr:
        raise GateError(
            f"SQNR against the reference is {parity.sqnr_db:.1f} dB, below --min-sqnr {options.min_sqnr:g}; "
            "nothing was deployed; look at the layers with qcompile eval --per-layer"
        )


def _notes(source: Source, serving: Serving, requests: _Requests, parity: Parity | None) -> list[str]:
    notes: list[str] = []
    if not requests.feeds:
        notes.append("no data: there is no warm-up request, and no outputs were compared (--data DATA)")
    if not serving.max_batch:
        notes.append("max_batch_size is 0: requests carry full shapes and are not joined")
    if parity is not None and parity.simulated:
        notes.append("ONNX Runtime alone cannot fuse this model's Q/DQ pairs: they were simulated one by one")
    if serving.accelerator:
        notes.append("TensorRT builds inside the server at the first requests; that was not tried here, it needs a GPU")
    return notes + _plan_notes(source)


def _plan_notes(source: Source) -> list[str]:
    if source.backend != "tensorrt":
        return []
    manifest = source.manifest
    where = ", ".join(cast(list[str], manifest.get("compute_capabilities", []))) or "the GPU that built it"
    portable = "VERSION_COMPATIBLE" in manifest.get("flags", [])
    how = (
        "start the server with --backend-config=tensorrt,version-compatible=true"
        if portable
        else f"the server's TensorRT must be {manifest['version']}"
    )
    return [f"the plan was not run: that needs a GPU ({where}); {how}"]
