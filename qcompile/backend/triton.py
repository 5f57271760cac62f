"""A model's entry in a Triton model repository: config.pbtxt as data, and the folder it lies in.

Sources: Triton's `model_config.proto` (fields), its "Model Configuration" guide (batch axis, warm-up), and the READMEs of
its tensorrt and onnxruntime backends (profiles, execution accelerators).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto

from qcompile.backend.pbtxt import Name, to_text
from qcompile.backend.profile import Profile
from qcompile.errors import ModelError, UsageError

Backend = Literal["tensorrt", "onnxruntime"]
Accelerator = Literal["tensorrt"]
FILES: dict[Backend, str] = {"tensorrt": "model.plan", "onnxruntime": "model.onnx"}
HEADER = "# Written by qcompile deploy; the fields are those of Triton's model_config.proto.\n"
CONFIG, WARMUP = "config.pbtxt", "warmup"
DEFAULT_MAX_BATCH = 8

TRITON_TYPES: dict[int, str] = {
    TensorProto.BOOL: "TYPE_BOOL", TensorProto.STRING: "TYPE_STRING",
    TensorProto.UINT8: "TYPE_UINT8", TensorProto.UINT16: "TYPE_UINT16",
    TensorProto.UINT32: "TYPE_UINT32", TensorProto.UINT64: "TYPE_UINT64",
    TensorProto.INT8: "TYPE_INT8", TensorProto.INT16: "TYPE_INT16",
    TensorProto.INT32: "TYPE_INT32", TensorProto.INT64: "TYPE_INT64",
    TensorProto.FLOAT16: "TYPE_FP16", TensorProto.BFLOAT16: "TYPE_BF16",
    TensorProto.FLOAT: "TYPE_FP32", TensorProto.DOUBLE: "TYPE_FP64",
}  # fmt: skip
NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "TYPE_BOOL": np.dtype(np.bool_),
    "TYPE_FP16": np.dtype(np.float16), "TYPE_BF16": np.dtype(ml_dtypes.bfloat16),
    "TYPE_FP32": np.dtype(np.float32), "TYPE_FP64": np.dtype(np.float64),
    **{f"TYPE_{kind}{bits}": np.dtype(f"{kind.lower()}{bits}") for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)},
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One input or output of the model file: full `shape`, axis 0 included; -1 is a dynamic axis, `axis0` its name."""

    name: str
    data_type: str
    shape: tuple[int, ...]
    axis0: str = ""


@dataclass(frozen=True)
class Interface:
    """What a client sees."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @property
    def batched(self) -> bool:
        """Whether axis 0 is dynamic in all inputs and outputs, and no two inputs name it differently."""
        tensors = (*self.inputs, *self.outputs)
        names = {t.axis0 for t in self.inputs if t.axis0}
        return all(t.shape and t.shape[0] == -1 for t in tensors) and len(names) <= 1


@dataclass(frozen=True)
class Serving:
    """What config.pbtxt says beside the interface.

    `max_batch` 0: no batch axis, requests carry full shapes.  `preferred` batch sizes and `queue_delay_us` are of the
    dynamic batcher.  `policy`: "latest", "all", or version numbers.  `profiles`: those of a plan, one context each.
    `precision`: the TensorRT execution provider's mode when `accelerator` is set.
    """

    name: str
    backend: Backend
    max_batch: int
    preferred: tuple[int, ...] = ()
    queue_delay_us: int | None = None
    instances: int = 1
    policy: Literal["latest", "all"] | tuple[int, ...] = "latest"
    profiles: tuple[Profile, ...] = ()
    accelerator: Accelerator | None = None
    precision: Literal["INT8", "FP16"] | None = None
    labels: str | None = None


@dataclass(frozen=True)
class WarmupFile:
    """One input of the warm-up request: `dims` as in a request (no batch axis when batching), `data` raw, little-endian."""

    input: str
    data_type: str
    dims: tuple[int, ...]
    file: str
    data: bytes


def interface_of(model: onnx.ModelProto) -> Interface:
    """Inputs (initializers left out) and outputs of `model`.

    Raises:
        ModelError: an output of unknown shape, or a type that Triton does not have.
    """
    constants = {t.name for t in model.graph.initializer}
    inputs = tuple(_tensor(v) for v in model.graph.input if v.name not in constants)
    return Interface(inputs, tuple(_tensor(v) for v in model.graph.output))


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    if kind.elem_type not in TRITON_TYPES or not kind.HasField("shape"):
        what = "no known shape" if kind.elem_type in TRITON_TYPES else "a type that Triton does not have"
        raise ModelError(f"{value.name!r} has {what}; export the model with the shapes and plain types of its inputs and outputs")
    dims = kind.shape.dim
    shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else -1 for d in dims)
    return Tensor(value.name, TRITON_TYPES[kind.elem_type], shape, dims[0].dim_param if dims else "")


def request_shape(tensor: Tensor, max_batch: int) -> tuple[int, ...]:
    """The shape without the batch axis when the server batches, else the full one."""
    return tensor.shape[1:] if max_batch else tensor.shape


def choose_batch(interface: Interface, asked: int | None, profiles: Sequence[Profile]) -> int:
    """max_batch_size: `asked`, else the largest batch of all profiles, else 8; 0 when the model has no batch axis.

    Raises:
        UsageError: `asked` is more than the model or its profiles take.
    """
    if not interface.batched:
        if asked:
            raise UsageError(
                f"--max-batch {asked}: not every input and output has a dynamic axis 0, so requests cannot be joined; use 0"
            )
        return 0
    limits = [r.max[0] for p in profiles for r in p.shapes.values()]
    limit = min(limits) if limits else None
    if limit is not None and asked is not None and asked > limit:
        raise UsageError(
            f"--max-batch {asked}: the engine's profile ends at {limit}; build with a larger profile, or ask for less"
        )
    return asked if asked is not None else limit or DEFAULT_MAX_BATCH


def check_serving(serving: Serving) -> None:
    """Refuse what the server would refuse when it loads the model.

    Raises:
        UsageError: a batch size above the largest, batching options without a batch axis, or a name that is no folder's.
    """
    name, top = serving.name, serving.max_batch
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        raise UsageError(f"{name!r} cannot be the name of a model; give a plain --name")
    if not top and (serving.preferred or serving.queue_delay_us is not None):
        raise UsageError("--preferred-batch and --queue-delay-us need a batch axis; drop them, or give --max-batch")
    large = [p for p in serving.preferred if not 0 < p <= top]
    if large:
        raise UsageError(f"--preferred-batch {large[0]} is not within 1..{top} (the largest batch); correct it")


def model_config(interface: Interface, serving: Serving, warmup: Sequence[WarmupFile] = ()) -> dict[str, Any]:
    """The ModelConfig message as {field: value}, in the order in which it is written."""
    config: dict[str, Any] = {
        "name": serving.name,
        "backend": serving.backend,
        **({"platform": "tensorrt_plan"} if serving.backend == "tensorrt" else {}),
        "default_model_filename": FILES[serving.backend],
        **interface_fields(interface, serving),
        "version_policy": _policy(serving),
        "instance_group": [_instances(serving)],
    }
    if serving.max_batch > 1:
        config["dynamic_batching"] = _batching(serving)
    if serving.accelerator:
        accelerators = {"gpu_execution_accelerator": [_accelerator(serving)]}
        config["optimization"] = {"execution_accelerators": accelerators}
    if warmup:
        config["model_warmup"] = [_warmup(warmup)]
    return config


def config_text(config: dict[str, Any]) -> str:
    """`config` as the contents of config.pbtxt."""
    return HEADER + to_text(config)


def interface_fields(interface: Interface, serving: Serving) -> dict[str, Any]:
    """`max_batch_size`, `input` and `output`: what clients rely on."""
    outputs = [_io(t, serving.max_batch) for t in interface.outputs]
    if serving.labels is not None:
        outputs[0]["label_filename"] = serving.labels
    return {
        "max_batch_size": serving.max_batch,
        "input": [_io(t, serving.max_batch) for t in interface.inputs],
        "output": outputs,
    }


def _io(tensor: Tensor, max_batch: int) -> dict[str, Any]:
    """Triton wants at least one dim: a scalar is dims [1] reshaped to []."""
    dims = request_shape(tensor, max_batch)
    io: dict[str, Any] = {"name": tensor.name, "data_type": Name(tensor.data_type), "dims": list(dims or (1,))}
    return io if dims else {**io, "reshape": {"shape": []}}


def _policy(serving: Serving) -> dict[str, Any]:
    match serving.policy:
        case "latest":
            return {"latest": {"num_versions": 1}}
        case "all":
            return {"all": {}}
        case versions:
            return {"specific": {"versions": list(versions)}}


def _instances(serving: Serving) -> dict[str, Any]:
    kind = "KIND_GPU" if serving.backend == "tensorrt" or serving.accelerator else "KIND_AUTO"
    group: dict[str, Any] = {"kind": Name(kind), "count": serving.instances}
    return group | ({"profile": [str(i) for i in range(len(serving.profiles))]} if len(serving.profiles) > 1 else {})


def _batching(serving: Serving) -> dict[str, Any]:
    batching: dict[str, Any] = {"preferred_batch_size": list(serving.preferred)} if serving.preferred else {}
    delay = serving.queue_delay_us
    return batching | ({} if delay is None else {"max_queue_delay_microseconds": delay})


def _accelerator(serving: Serving) -> dict[str, Any]:
    """ONNX Runtime's TensorRT execution provider, with the profile's shapes so that it builds once."""
    options = {} if serving.precision is None else {"precision_mode": serving.precision}
    for profile in serving.profiles[:1]:
        options |= {f"trt_profile_{which}_shapes": _shapes(profile, which) for which in ("min", "opt", "max")}
    return {"name": "tensorrt", "parameters": [{"key": k, "value": v} for k, v in options.items()]}


def _shapes(profile: Profile, which: str) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, getattr(r, which)))}" for name, r in profile.shapes.items())


def _warmup(files: Sequence[WarmupFile]) -> dict[str, Any]:
    """One request of real data; Triton adds the batch axis of 1 by itself."""
    inputs = [
        {"key": f.input, "value": {"data_type": Name(f.data_type), "dims": list(f.dims), "input_data_file": f.file}}
        for f in files
    ]
    return {"name": "sample", "batch_size": 1, "inputs": inputs}
