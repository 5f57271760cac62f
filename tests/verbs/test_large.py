"""A model that counts as large (the limits are lowered) goes through the whole compiler: mapped, spilled, in blocks."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile import compile
from qcompile.calib.sweep import provider
from qcompile.execute import compare as compare_module
from qcompile.execute import opening
from qcompile.ir import spill
from qcompile.ir.model import Model
from qcompile.ir.spill import scratch_folder
from tools.bench_large import WORDS, compare, write_transformer


@pytest.mark.parametrize(("target", "blocked"), [("trt", True), ("ort", False)])
def test_quantized_in_blocks(target: str, blocked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_transformer(tmp_path / "model.onnx", layers=3, width=128)
    np.savez(tmp_path / "data.npz", ids=np.random.default_rng(0).integers(0, WORDS, (12, 6)))
    for module, name, size in (
        (spill, "LARGE_MODEL", 1 << 20), (spill, "SPILLED_TENSOR", 1 << 12), (opening, "SPILLED_TENSOR", 1 << 12),
        (compare_module, "PART_BYTES", 1 << 19),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, size)
    limits: list[int] = []
    sweep = provider.blocked_sweep

    def spied(*args: Any, limit: int, **options: Any) -> Any:
        limits.append(limit)
        return sweep(*args, limit=limit // 16, **options)

    monkeypatch.setattr(provider, "blocked_sweep", spied)
    if blocked:
        monkeypatch.setattr(provider, "block_bytes", lambda model, limit: model.weight_bytes())
    options: dict[str, Any] = {
        "target": target,
        "scheme": "w8a8",
        "calib": str(tmp_path / "data.npz"),
        "output": tmp_path / "out.onnx",
    }
    result = compile(path, passes="smooth{alpha=0.5}", threads=1, **options)
    assert bool(limits) == blocked
    assert result.compared is not None and (result.compared.sqnr_db or 0) > 25
    assert Model.load(result.output).weight_bytes() < Model.load(path).weight_bytes() / 2
    del result
    gc.collect()  # graphs are cycles
    *layers, logits = compare(str(path), str(tmp_path / "out.onnx"), str(tmp_path / "data.npz"))
    assert len(layers) == 3 and min(*layers, logits) > 25
    gc.collect()
    assert not list(scratch_folder().glob("*.data"))
