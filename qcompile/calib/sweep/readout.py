"""From the outputs of one batch to what observers see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.observe import Probe, Seen, Tally
from qcompile.calib.sweep.finite import require_finite
from qcompile.calib.sweep.instrument import Instrumented
from qcompile.ir.model import Model

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Batch:
    """The outputs of one run on `held` samples from number `first` on, in chunk number `chunk`."""

    plan: Instrumented
    found: Arrays
    first: int
    held: int
    chunk: int

    def add_to(self, tally: Tally[Any], probe: Probe) -> None:
        """Count this batch.

        Raises:
            DataError: NaN or infinite values that the probe's observer refuses.
            ValueError: another reason of the observer's.
        """
        reduced = probe in self.plan.reduced
        arrays = tuple(self.found[name] for name in self.plan.outputs_of(probe))
        if probe.tensor in self.plan.masked:
            arrays = (_bounded(arrays[0]), *arrays[1:])
        try:
            tally.add(Seen(arrays, reduced, self.first, self.held, self.chunk))
        except ValueError:
            if not reduced:
                require_finite(self.plan.model, probe.tensor, arrays[0], self.first)
            raise

    def require_finite(self, model: Model, fetch: Callable[[str], NDArray[Any]]) -> None:
        """Look at a tensor itself where a reduction of it is not finite: the sum of finite values may overflow.

        Raises:
            DataError: NaN or infinite values.
        """
        for tensor, output in self.plan.raw.items():
            if tensor in self.plan.searched:
                require_finite(model, tensor, self.found[output], self.first)
        for (tensor, _), reduced in self.plan.reductions.items():
            if not all(np.isfinite(self.found[n]).all() for n in reduced.names):
                require_finite(model, tensor, fetch(tensor), self.first)


def _bounded(array: NDArray[Any]) -> NDArray[Any]:
    """Infinities as large as the largest finite value; NaN stays."""
    odd = np.isinf(array) if array.dtype.kind == "f" else np.zeros(array.shape, np.bool_)
    if not odd.any():
        return array
    finite = array[np.isfinite(array)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
    return np.where(odd, np.clip(array, low, high), array)
