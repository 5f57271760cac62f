"""Stand-ins for what only a full TensorRT, or a GPU, has."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np


def fake_trt(*lacking: str) -> Any:
    """A module handle with TensorRT's switches, without those in `lacking` (e.g. "STRIP_PLAN")."""
    flags = {f: f for f in ("VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT") if f not in lacking}
    levels = {f: f for f in ("AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY") if f not in lacking}
    module = SimpleNamespace(
        BuilderFlag=SimpleNamespace(**flags),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        IBuilderConfig=SimpleNamespace(create_timing_cache=lambda data: None),
        Runtime=type("Runtime", (), {}),
    )
    if "HardwareCompatibilityLevel" not in lacking:
        module.HardwareCompatibilityLevel = SimpleNamespace(**levels)
    if "timing_cache" in lacking:
        module.IBuilderConfig = SimpleNamespace()
    return module


class FakeRunner:
    """Polygraphy's TrtRunner as far as `infer` uses it: y = factor * x, x of shape [n, 4] with profile 1 / 3 / 8."""

    def __init__(self, factor: float, dtype: type = np.float32, dims: tuple[int, ...] = (-1, 4)) -> None:
        self.factor, self.dtype, self.dims, self.calls = factor, dtype, dims, 0
        self.engine = SimpleNamespace(
            get_tensor_profile_shape=lambda name, profile: [(1, 4), (3, 4), (8, 4)],
            is_shape_inference_io=lambda name: False,
        )

    def get_input_metadata(self, use_numpy_dtypes: bool) -> dict[str, Any]:
        assert use_numpy_dtypes
        return {"x": SimpleNamespace(dtype=self.dtype, shape=self.dims)}

    def infer(self, feeds: Mapping[str, Any], copy_outputs_to_host: bool = True) -> dict[str, Any]:
        self.calls += 1
        assert feeds["x"].dtype == self.dtype
        return {"y": feeds["x"] * self.factor} if copy_outputs_to_host else {}
