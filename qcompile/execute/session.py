"""ONNX Runtime sessions with pinned options, quiet logs and readable failures."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qcompile.errors import InputError, ModelError, UsageError

Optimize = Literal["off", "basic", "all"]
Session = ort.InferenceSession
RUNTIME_VERSION: str = ort.__version__

_LEVELS: dict[Optimize, ort.GraphOptimizationLevel] = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_FATAL = 4
_CODE_LOCATION = re.compile(r"\S*/\S+\.(?:cc|h|cpp):\d+ [^ ]+(?:\([^)]*\))?(?: const)? ?")
_NOISE = re.compile(r"Stacktrace|#\d|0x|\*+|\[?/|={3}|Please fix")
_STATUS = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_MAX_BYTES = 2**31 - 1
SAMPLES = "qcompile_samples"
"""An array beside the inputs whose length is the number of samples, where that is not the first axis of the inputs."""
_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
MAPPED: dict[str, Any] = {"arena": False, "packed": False}
"""Options of `make_session` that leave weights in their files: packed copies of them would be anonymous memory."""
_DEVICE_OPTIONS = {"use_tf32": "0"}  # ten bits of mantissa would show in every comparison


_libraries: list[str] = []


class Providers(NamedTuple):
    """Execution providers to ask for, and in one line why CUDA is not among them (None when it is)."""

    names: tuple[str, ...]
    reason: str | None


class Batches(Protocol):
    """Data that can be read in batches of named arrays."""

    def batches(self, size: int) -> Iterator[dict[str, NDArray[Any]]]: ...


@functools.cache
def providers() -> Providers:
    """CUDA when a device, a driver and the provider's libraries are all there, else the CPU and the reason."""
    reason = _why_no_cuda()
    return Providers((_CPU,) if reason else (_CUDA, _CPU), reason)


def device_note() -> str | None:
    """In one line where models run, if this ONNX Runtime could use a device."""
    if _CUDA not in ort.get_available_providers():
        return None
    return providers().reason or "running on CUDA"


def make_session(
    model: bytes | str | Path,
    *,
    optimize: Optimize = "all",
    qdq_fusion: bool = True,
    threads: int | None = None,
    use: Sequence[str] | None = None,
    extra: dict[str, str] | None = None,
    external_folder: str | Path | None = None,
    weights: Mapping[str, NDArray[Any]] | None = None,
    packed: bool = True,
    arena: bool = True,
    reuse: bool = True,
) -> ort.InferenceSession:
    """A session on serialized bytes or a file.

    Args:
        optimize: graph optimizations: `off` for verification, `all` for speed.
        qdq_fusion: False keeps Q/DQ pairs as they are (simulation of a target that is not ONNX Runtime).
        threads: intra-op threads; None leaves the number to ONNX Runtime.
        use: execution providers; default `providers().names`, and the CPU alone where the device has no room for the model.
        extra: further session config entries; they win over the pinned ones.
        external_folder: where the external data of a model given as bytes lies.
        weights: data of initializers that `model` holds as external, read where the arrays lie as long as the session lives.
        packed: False lets kernels read weights as they are instead of copies that they pack for themselves.
        arena: False frees every tensor at once instead of keeping its memory for the next run: a smaller peak, slower.
        reuse: False plans no reuse of buffers: planning takes time by the square of the nodes where shapes are not known.

    Raises:
        ModelError: ONNX Runtime cannot load the model; the message holds its last meaningful line.
    """
    if isinstance(model, bytes) and len(model) > _MAX_BYTES:
        raise ModelError("a model above 2 GB cannot be loaded from memory; save it with external data and give its path")
    extra = (extra or {}) | ({} if packed else {"session.disable_prepacking": "1"})
    options = session_options(optimize=optimize, qdq_fusion=qdq_fusion, threads=threads, extra=extra)
    options.enable_mem_reuse = reuse
    if not arena:
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    if external_folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(external_folder))
    source = model if isinstance(model, bytes) else str(model)
    names = tuple(use or providers().names)
    held = _share(options, weights or {}, in_place=optimize == "off" and names == (_CPU,))
    try:
        session = _open(source, options, names, fall_back=use is None)
        vars(session)["weights"] = held  # ONNX Runtime keeps no reference
        return session
    except Exception as e:  # onnxruntime's classes share no base but Exception
        name = "" if isinstance(model, bytes) else f" {model}"
        line = meaningful_line(e)
        raise ModelError(f"ONNX Runtime cannot load the model{name}: {line}; {_advice(line)}") from e


def _advice(line: str) -> str:
    if "is not a registered function/op" not in line:
        return "data is measured there: see whether your file itself loads in ONNX Runtime, and export it again if not"
    return (
        "data can only be measured on a model that ONNX Runtime runs: give the operator's library with --ort-library PATH, export"
        " it as a local function of standard operators, or compile the parts in front of it and behind it"
    )


def _share(options: ort.SessionOptions, weights: Mapping[str, NDArray[Any]], *, in_place: bool) -> list[ort.OrtValue]:
    """Hand weights to a session; `in_place` where no optimization makes others of them and they need not move to a device: the
    session then copies none."""
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    if in_place:
        for name, value in zip(weights, values, strict=True):
            options.add_initializer(name, value)
    elif values:  # copies each
        options.add_external_initializers(list(weights), values)
    return values


def _open(source: bytes | str, options: ort.SessionOptions, names: Sequence[str], *, fall_back: bool) -> ort.InferenceSession:
    """ONNX Runtime's own fallback prints; this one does not."""
    asked: list[Any] = [(name, _DEVICE_OPTIONS) if name == _CUDA else name for name in names]
    try:
        return ort.InferenceSession(source, options, providers=asked, enable_fallback=0)
    except Exception:  # as in make_session
        if not fall_back or _CUDA not in names:
            raise
        return ort.InferenceSession(source, options, providers=[_CPU], enable_fallback=0)


def session_options(
    *, optimize: Optimize = "all", qdq_fusion: bool = True, threads: int | None = None, extra: dict[str, str] | None = None
) -> ort.SessionOptions:
    """The pinned options: no spinning threads (they steal cores from other sessions), no int8 activations behind
    weight-only DQ -> MatMul (`accuracy_level` 1 is float32; ONNX Runtime's default 4 is int8), no log lines."""
    options = ort.SessionOptions()
    options.graph_optimization_level = _LEVELS[optimize]
    options.log_severity_level = _FATAL
    if threads is not None:
        options.intra_op_num_threads = threads
    pinned = {"session.intra_op.allow_spinning": "0", "session.qdq_matmulnbits_accuracy_level": "1"}
    if not qdq_fusion:
        pinned["session.disable_quant_qdq"] = "1"
        pinned["session.x64quantprecision"] = "1"  # without VNNI, x86 kernels saturate sums of u8 * s8 at 16 bit
    for key, value in {**pinned, **(extra or {})}.items():
        options.add_session_config_entry(key, value)
    for path in _libraries:
        options.register_custom_ops_library(path)
    return options


def use_libraries(paths: Sequence[str]) -> None:
    """Sessions that are opened from now on know the custom operators of these libraries, and of no others.

    Raises:
        UsageError: ONNX Runtime cannot load one; then none is known.
    """
    _libraries.clear()
    for path in paths:
        try:
            ort.SessionOptions().register_custom_ops_library(path)
        except Exception as e:  # as in make_session
            line = f"--ort-library {path}: ONNX Runtime {RUNTIME_VERSION} cannot load it ({meaningful_line(e)})"
            raise UsageError(f"{line}; give a library of custom operators that was built for it") from e
    _libraries.extend(paths)


def libraries() -> tuple[str, ...]:
    """The libraries that sessions know."""
    return tuple(_libraries)


def seed_random_operators(seed: int) -> None:
    """Sessions that are opened from now on draw from `seed`, so that the same command calibrates on the same values."""
    ort.set_seed(seed)


def as_array(answer: Any) -> NDArray[Any]:
    """What ONNX Runtime answers for an output as one array; sequences and maps are strung together."""
    if isinstance(answer, dict):
        answer = list(answer.values())
    if not isinstance(answer, list):
        return np.asarray(answer)
    parts = [as_array(x).reshape(-1) for x in answer]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def run_batches(
    session: ort.InferenceSession, dataset: Batches, batch: int, outputs: Sequence[str] | None = None
) -> Iterator[list[NDArray[Any]]]:
    """The outputs (all, or those named) of each batch, in the data's order; inputs that the model does not have are ignored.

    Raises:
        InputError: ONNX Runtime fails on a batch; the message names the first sample of it.
    """
    wanted = {i.name for i in session.get_inputs()}
    first = 0
    for feeds in dataset.batches(batch):
        yield run(session, {k: v for k, v in feeds.items() if k in wanted}, outputs, first)
        first += batch_length(feeds)


def run(
    session: ort.InferenceSession,
    feeds: dict[str, NDArray[Any]],
    outputs: Sequence[str] | None = None,
    first_sample: int = 0,
    *,
    fall_back: bool = True,
) -> list[NDArray[Any]]:
    """One run; failures name the first sample of the batch.

    ONNX Runtime takes no bfloat16 arrays: sessions of `qcompile.execute.opening` have float32 inputs in their place.

    With `fall_back`, where a device fails (its memory is full, a kernel is missing), the session runs on the CPU from then on.

    Raises:
        InputError: ONNX Runtime fails.
    """
    wanted = list(outputs) if outputs is not None else None
    feeds = {name: array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array for name, array in feeds.items()}
    try:
        return [as_array(v) for v in _run(session, wanted, feeds, fall_back)]
    except Exception as e:  # as in make_session
        raise InputError(
            f"ONNX Runtime failed on the batch that starts at sample {first_sample}: {meaningful_line(e)}; "
            "check the values and shapes of the data against the model"
        ) from e


def _run(
    session: ort.InferenceSession, outputs: list[str] | None, feeds: dict[str, NDArray[Any]], fall_back: bool
) -> Sequence[Any]:
    try:
        return session.run(outputs, feeds)
    except Exception:  # as in make_session
        if not fall_back or _CUDA not in session.get_providers():
            raise
        session.set_providers([_CPU])
        return session.run(outputs, feeds)


def batch_length(feeds: dict[str, NDArray[Any]]) -> int:
    """How many samples a batch holds: as many as `SAMPLES` is long, else the first axis of its first array that has one."""
    if SAMPLES in feeds:
        return len(feeds[SAMPLES])
    return next((v.shape[0] for v in feeds.values() if v.ndim), 1)


def meaningful_line(error: Exception) -> str:
    """The last line of an ONNX Runtime message that says something, without code locations and stack frames."""
    lines = [_CODE_LOCATION.sub("", line.strip()) for line in str(error).splitlines()]
    telling = [line for line in lines if line and not _NOISE.match(line)]
    last = _STATUS.sub("", telling[-1]).rstrip(" .;") if telling else ""
    return last or type(error).__name__


def _why_no_cuda() -> str | None:
    if _CUDA not in ort.get_available_providers():
        return "running on the CPU: this onnxruntime has no CUDA provider"
    if not _cuda_devices():
        return "running on the CPU: no CUDA device or driver"
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if os.name == "posix" and (missing := _load_failure(library)):
        return f"running on the CPU: the CUDA provider does not load ({missing})"
    return _why_cuda_session_fails()


def _cuda_devices() -> int:
    """Number of CUDA devices that the driver reports (0 without a driver)."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        count = ctypes.c_int(0)
        working = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    except (OSError, AttributeError):
        return 0
    return count.value if working else 0


def _load_failure(library: Path) -> str | None:
    """Which shared library the CUDA provider misses; its own host symbols do not count."""
    if hasattr(ort, "preload_dlls"):
        _preload()
    try:
        ctypes.CDLL(str(library))
    except OSError as e:
        text = str(e).splitlines()[0]
        return None if "undefined symbol" in text else text.removeprefix(f"{library}: ")
    return None


def _preload() -> None:
    """Make the CUDA libraries of Python wheels findable; onnxruntime prints when they are not there."""
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()


def _why_cuda_session_fails() -> str | None:
    """Try the smallest model on the device."""
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", value[:1], value[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    try:
        session = _open(proto.SerializeToString(), session_options(), (_CUDA, _CPU), fall_back=False)
        session.run(None, {"x": np.ones(1, np.float32)})
    except Exception as e:  # as in make_session
        return f"running on the CPU: the CUDA provider fails ({meaningful_line(e)})"
    if _CUDA not in session.get_providers():
        return "running on the CPU: the CUDA provider does not start"
    return None
