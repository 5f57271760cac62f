"""Is the file that a server will load the model that was meant?  Runs it through its own config.pbtxt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.backend.triton import NUMPY_TYPES
from qcompile.calib.data.dataset import Dataset
from qcompile.errors import GateError, ModelError
from qcompile.execute.feeds import Feeds, run_padded
from qcompile.execute.metrics import MAX_SQNR_DB, Distance
from qcompile.execute.session import Session, make_session, meaningful_line

CPU = ("CPUExecutionProvider",)
PROVIDER = "ONNX Runtime, CPU"
# ONNX Runtime's own default, which Triton leaves as it is: weight-only MatMuls may read int8 activations.
AS_SERVED = {"session.qdq_matmulnbits_accuracy_level": "4"}
Array = NDArray[Any]


@dataclass
class Parity:
    """Distances of the served file's outputs from the reference's, by output."""

    reference: Path
    simulated: bool
    samples: int = 0
    outputs: dict[str, Distance] = field(default_factory=dict)

    @property
    def sqnr_db(self) -> float:
        """Of the worst output; 200 when all outputs are equal."""
        return min((d.sqnr_db for d in self.outputs.values()), default=MAX_SQNR_DB)

    @property
    def equal(self) -> bool:
        """Whether no output differs at all."""
        return all(d.largest_error == 0 for d in self.outputs.values())

    def to_json(self) -> dict[str, Any]:
        """`reference, samples, simulated, sqnr_db, equal, outputs` of `name, sqnr_db, max_error, relative_error`."""
        return {
            "reference": str(self.reference),
            "provider": PROVIDER,
            "samples": self.samples,
            "simulated": self.simulated,
            "sqnr_db": self.sqnr_db,
            "equal": self.equal,
            "outputs": [
                {"name": n, "sqnr_db": d.sqnr_db, "max_error": d.largest_error, "relative_error": d.relative_error}
                for n, d in self.outputs.items()
            ],
        }


def check_served(
    served: Path, config: Mapping[str, Any], reference: Path, requests: Sequence[Feeds], may_simulate: bool = False
) -> Parity:
    """Run `requests` (as a client sends them, joined to batches) through `served` and `reference`.

    Args:
        served: the model file of the repository.
        config: its ModelConfig: names, types and dims are taken from here, and what the file answers must agree.
        may_simulate: when ONNX Runtime cannot fuse the file's Q/DQ pairs, run it pair by pair instead of failing.

    Raises:
        ModelError: ONNX Runtime does not load the file, as Triton would not.
        GateError: an answer does not have the name, type or dims that the config promises.
    """
    session, simulated = _as_served(served, may_simulate)
    other, _ = _as_served(reference, may_simulate)
    parity = Parity(reference, simulated, outputs={o["name"]: Distance() for o in config["output"]})
    for feeds in requests:
        typed = as_requested(feeds, config)
        got = run_padded(session, typed, None, parity.samples, list(parity.outputs))
        want = run_padded(other, typed, None, parity.samples)
        _tally(parity, config, _batch(typed, config), got, want)
    return parity


def _as_served(model: Path, may_simulate: bool) -> tuple[Session, bool]:
    try:
        return make_session(model, use=CPU, extra=AS_SERVED), False
    except ModelError as error:
        if not may_simulate:
            raise ModelError(
                f"ONNX Runtime does not load the model, and Triton's onnxruntime backend is ONNX Runtime ({_cause(error)}); "
                "serve an engine (qcompile build --target trt), or add --accelerator tensorrt"
            ) from error
        return make_session(model, use=CPU, extra=AS_SERVED, qdq_fusion=False), True


def _cause(error: ModelError) -> str:
    return meaningful_line(error.__cause__) if isinstance(error.__cause__, Exception) else str(error)


def as_requested(feeds: Feeds, config: Mapping[str, Any]) -> Feeds:
    """The arrays in the config's order and types.

    Raises:
        GateError: an array does not have the dims of the config.
    """
    typed = {i["name"]: np.ascontiguousarray(feeds[i["name"]], NUMPY_TYPES[i["data_type"]]) for i in config["input"]}
    for io in config["input"]:
        _require_dims(io, typed[io["name"]], config["max_batch_size"])
    return typed


def full_dims(io: Mapping[str, Any], max_batch: int) -> list[int]:
    """The dims that the model file sees: reshaped, and with the batch axis when the server adds one."""
    dims = io["reshape"]["shape"] if "reshape" in io else io["dims"]
    return [-1, *dims] if max_batch else list(dims)


def _require_dims(io: Mapping[str, Any], array: Array, max_batch: int) -> None:
    dims = full_dims(io, max_batch)
    fits = len(dims) == array.ndim and all(d in (-1, n) for d, n in zip(dims, array.shape, strict=False))
    if not fits or array.dtype != NUMPY_TYPES[io["data_type"]]:
        promised = f"{io['data_type']} {dims}"
        raise GateError(
            f"{io['name']!r} is {array.dtype} {list(array.shape)}, its config promises {promised}; nothing was deployed"
        )


def _batch(feeds: Feeds, config: Mapping[str, Any]) -> int | None:
    return len(next(iter(feeds.values()))) if config["max_batch_size"] else None


def _tally(parity: Parity, config: Mapping[str, Any], batch: int | None, got: Sequence[Array], want: Sequence[Array]) -> None:
    if len(got) != len(want):
        raise ModelError(f"the reference has {len(want)} outputs and the model {len(got)}; give the model that it was made from")
    for io, g, w in zip(config["output"], got, want, strict=True):
        _require_dims(io, g, config["max_batch_size"])
        if batch is not None and len(g) != batch:
            raise GateError(
                f"{io['name']!r} answers {batch} requests with {len(g)} rows: it has no batch axis; use --max-batch 0"
            )
        if g.shape != w.shape:
            raise ModelError(
                f"output {io['name']!r} is {w.shape} in the reference and {g.shape} in the model; give its own source"
            )
        if not np.isfinite(g.astype(np.float64)).all():
            raise GateError(
                f"{io['name']!r} holds NaN or infinity on the data; nothing was deployed; see: qcompile eval --per-layer"
            )
        parity.outputs[io["name"]].add(w, g)
    parity.samples += batch or 1


def requests_of(data: Dataset, max_batch: int, fixed: int | None) -> Iterator[Feeds]:
    """What the server hands to the model: joined requests up to `max_batch`, or one full-shape request at a time.

    The last samples are left out when they do not fill a `fixed` batch axis.
    """
    size = fixed or max_batch or 1
    return (feeds for feeds in data.batches(size) if fixed is None or all(len(x) == fixed for x in feeds.values()))
