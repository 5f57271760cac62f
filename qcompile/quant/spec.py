"""How a tensor is quantized: granularity, QuantSpec, QParams and the scheme presets."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qcompile.quant.qtype import FLOAT4E2M1, FLOAT8E4M3FN, INT4, INT8, QType, simulated_int


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: scale has shape []."""


@dataclass(frozen=True)
class PerAxis:
    """One scale a slice of `axis` (non-negative): scale has shape [dim(axis)]."""

    axis: int


@dataclass(frozen=True)
class PerBlock:
    """One scale per `size` consecutive elements of `axis`: scale has the tensor's rank."""

    axis: int
    size: int


Granularity = PerTensor | PerAxis | PerBlock


@dataclass(frozen=True)
class QuantSpec:
    """What a quantizer is, before its scale is known; `symmetric` means zero_point 0."""

    qtype: QType
    granularity: Granularity = PerTensor()
    symmetric: bool = True

    def with_granularity(self, granularity: Granularity) -> QuantSpec:
        """The same spec at another granularity."""
        return replace(self, granularity=granularity)


@dataclass(frozen=True, eq=False)
class QParams:
    """x ~ (code - zero_point) * scale.  `scale` float64 > 0 and `zero_point` int64 of equal shape.

    `tensor_scale` (NVFP4): the block scales are E4M3 numbers times this.
    `curve`: what else the levels of a companded type depend on (`quant.companding.codebook`).
    """

    scale: NDArray[np.float64]
    zero_point: NDArray[np.int64]
    tensor_scale: float | None = None
    curve: tuple[float, ...] = ()


@dataclass(frozen=True)
class Scheme:
    """A preset: the types of weights and activations, and of the float rest.

    `fallback`: the type, per tensor and per channel, of what blocks do not fit (convolutions, attention, odd lengths).
    """

    name: str
    weight: QType | None
    activation: QType | None
    body: Literal["float32", "float16", "bfloat16"] = "float32"
    block_size: int | None = None
    fallback: QType | None = None

    @property
    def simulated(self) -> bool:
        """Whether no engine runs this width natively (numbers are right, speed is not gained)."""
        return any(t is not None and t.narrow for t in (self.weight, self.activation))


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("w8a8", INT8, INT8),
        Scheme("fp8", FLOAT8E4M3FN, FLOAT8E4M3FN),
        Scheme("fp16", None, None, body="float16"),
        Scheme("bf16", None, None, body="bfloat16"),
        Scheme("w6a6", simulated_int(6), simulated_int(6)),
        Scheme("w4a8", simulated_int(4), INT8),
        Scheme("w4a4", simulated_int(4), simulated_int(4)),
        Scheme("w4a16", INT4, None, block_size=128),
        Scheme("nvfp4", FLOAT4E2M1, FLOAT4E2M1, block_size=16, fallback=FLOAT8E4M3FN),
        Scheme("mxfp8", FLOAT8E4M3FN, FLOAT8E4M3FN, block_size=32, fallback=FLOAT8E4M3FN),
    )
}


def integer_scheme(name: str) -> Scheme:
    """`wXaY`: weights in X and activations in Y bits, 2 to 8.

    Raises:
        ValueError: another name.
    """
    match = re.fullmatch(r"w([2-8])a([2-8])", name)
    if match is None:
        raise ValueError(f"{name!r} is no width; write wXaY with 2 to 8 bits, as w4a8")
    return Scheme(name, simulated_int(int(match[1])), simulated_int(int(match[2])))
