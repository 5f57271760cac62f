"""What a deployment is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from qcompile.backend.triton import Accelerator, Backend
from qcompile.errors import UsageError
from qcompile.verbs.libraries import OrtLibraryOptions
from qcompile.verbs.options import Written

DEFAULT_SAMPLES = 32
Policy = Literal["latest", "all"] | tuple[int, ...]


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of `N,N`.

    Raises:
        UsageError: it is no such list.
    """
    try:
        return tuple(int(n) for n in text.split(",") if n.strip())
    except ValueError:
        raise UsageError(f"{text!r} is not a list of numbers; write for example 4,8") from None


def policy_of(text: str) -> Policy:
    """`latest`, `all`, or version numbers.

    Raises:
        UsageError: it is none of them.
    """
    return text if text in ("latest", "all") else numbers(text)


@dataclass(frozen=True, kw_only=True)
class DeployOptions(OrtLibraryOptions):
    """What is served, and how."""

    triton: Annotated[Path, "The model repository; made if missing.", Written("DIR")]
    name: Annotated[str | None, "Of the model in the repository; default: the file's name up to its first dot."] = None
    backend: Annotated[Backend | None, "Default: tensorrt for engines."] = None
    max_batch: Annotated[int | None, "0: no batching. Default: the engine's profile, else 8.", Written("N", least=0)] = None
    preferred_batch: Annotated[
        tuple[int, ...], "Batch sizes that the dynamic batcher waits for.", Written("N,N", read=numbers)
    ] = ()
    queue_delay_us: Annotated[int | None, "How long a request may wait for others.", Written("N", least=0)] = None
    instances: Annotated[int, "Copies on each GPU.", Written("N", least=1)] = 1
    version: Annotated[int, "The version folder.", Written("N", least=1)] = 1
    policy: Annotated[Policy, "Versions to serve: latest, all, or N,N.", Written("P", read=policy_of)] = "latest"
    accelerator: Annotated[Accelerator | None, "For ONNX models: run on TensorRT inside ONNX Runtime."] = None
    labels: Annotated[Path | None, "Class names, one a line.", Written("FILE")] = None
    data: Annotated[
        str | None, "Real requests: warm-up and parity check. Default: the data beside the reference or the model.",
        Written("DATA"),
    ] = None  # fmt: skip
    preprocess: Annotated[str | None, "For pictures: a preset or a TOML file.", Written("SPEC")] = None
    samples: Annotated[int | None, f"Default: at most {DEFAULT_SAMPLES}.", Written(least=1)] = None
    reference: Annotated[Path | None, "The float model to compare outputs with.", Written("REF.onnx")] = None
    min_sqnr: Annotated[float | None, "Deploy nothing (exit 1) if the SQNR is lower.", Written("DB")] = None
    onnx: Annotated[Path | None, "What the engine was built from; default: as its manifest says.", Written("FILE")] = None
    replace: Annotated[bool, "Overwrite this version, and the config."] = False
