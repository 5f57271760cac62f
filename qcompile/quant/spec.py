"""How a tensor is quantized: granularity, QuantSpec, QParams and the scheme presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qcompile.quant.qtype import FLOAT8E4M3FN, INT4, INT8, QType, simulated_int


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
RangeMethod = Literal["minmax", "percentile", "mse"]


@dataclass(frozen=True)
class QuantSpec:
    """What a quantizer is, before its scale is known.

    `symmetric` means zero_point 0; `method` chooses the clipping range of activations and weights.
    """

    qtype: QType
    granularity: Granularity = PerTensor()
    symmetric: bool = True
    method: RangeMethod = "minmax"

    def with_granularity(self, granularity: Granularity) -> QuantSpec:
        """The same spec at another granularity."""
        return replace(self, granularity=granularity)


@dataclass(frozen=True, eq=False)
class QParams:
    """x ~ (code - zero_point) * scale.  `scale` float64 > 0 and `zero_point` int64 of equal shape."""

    scale: NDArray[np.float64]
    zero_point: NDArray[np.int64]


@dataclass(frozen=True)
class Scheme:
    """A preset: the types of weights and activations, and of the float rest."""

    name: str
    weight: QType | None
    activation: QType | None
    body: Literal["float32", "float16"] = "float32"
    block_size: int | None = None

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
        Scheme("w6a6", simulated_int(6), simulated_int(6)),
        Scheme("w4a8", simulated_int(4), INT8),
        Scheme("w4a4", simulated_int(4), simulated_int(4)),
        Scheme("w4a16", INT4, None, block_size=128),
    )
}
