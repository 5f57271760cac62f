"""What TensorRT-RTX makes of a split shortcut: both halves of the layer run in INT8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qcompile.backend.audit import audit
from tests.passes.equivalent.joined import SHAPE, joined
from tests.passes.running import context, pipeline


@pytest.mark.rtx
@pytest.mark.parametrize(("groups", "sizes"), [(1, (64, 32)), (3, (64, 32))])
def test_both_halves_run_in_int8(groups: int, sizes: tuple[int, int], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    arrays = {"x": np.random.default_rng(0).standard_normal((8, *SHAPE)).astype(np.float32)}
    made, _ = pipeline("split-shortcut", joined(groups=groups, sizes=sizes), arrays, context("rtx", quantize=("conv",)))
    result = audit(made.save(tmp_path / "m.onnx"), "sm89")
    reads = {n.item.node: n.reads for n in result.nodes if "_part" in n.item.node}
    assert reads == {"conv_part0": "int8", "conv_part1": "int8"}
    assert result.share == 1.0
