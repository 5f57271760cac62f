"""The table of tools/bench_audit.py on one small model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.rtx
def test_every_scheme_and_gpu_is_audited() -> None:
    pytest.importorskip("tensorrt_rtx")
    command = [sys.executable, str(ROOT / "tools" / "bench_audit.py"), "--only", "digits_cnn", "--no-sizes", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout)["rows"]
    assert [(r["scheme"], r["gpu"]) for r in rows] == [("w8a8", "sm86"), ("w8a8", "sm89"), ("fp8", "sm89"), ("fp8", "sm120")]
    assert all(r["share"] == 1.0 and r["coverage"] > 0.8 and not r["wasted_pairs"] and r["size"] is None for r in rows)
