"""Accuracy by range method: python tools/bench_ranges.py [--scheme w8a8] [--target trt] [--models char_gpt,vit_digits] [--json]

Compiles every model of models/ that has evaluation data with each --range from the same calibration samples, and compares
it with the float model on data that was not calibrated on.  `used` says which method `search` took, and how often.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import qcompile
from qcompile.calib.data import load_data
from qcompile.ir.model import Model
from qcompile.verbs.evaluate.outputs import evaluate

MODELS = Path(__file__).parents[1] / "models"
RANGES = ("minmax", "percentile", "entropy", "mse", "weighted", "search")


def measure(path: Path, method: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    out = folder / f"{path.stem}.{method}.onnx"
    chosen: dict[str, Any] = {"target": options.target, "scheme": options.scheme, "threads": 1, "verify": "off"}
    result = qcompile.compile(path, output=out, range=method, **chosen)
    used = Counter(str(r.numbers["range"]) for r in result.remarks if "range" in r.numbers)
    seconds = time.perf_counter() - start
    data = load_data(str(path.with_name(f"{path.stem}.eval.npz")), Model.load(path).inputs()).take(options.samples)
    found = evaluate(path, out, data, threads=1)
    task = {**found.candidate.metrics, **{f"float_{k}": v for k, v in found.reference.metrics.items()}}
    figures = {
        "sqnr_db": None if found.sqnr_db is None else round(found.sqnr_db, 2),
        "seconds": round(seconds, 1),
        "used": dict(used.most_common()),
    }
    return {"model": path.stem, "range": method, **task, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--target", default="trt")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--models", default="")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    wanted = [m for m in options.models.split(",") if m]
    paths = [p for p in sorted(MODELS.glob("*.onnx")) if p.with_name(f"{p.stem}.eval.npz").exists()]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for path in (p for p in paths if not wanted or p.stem in wanted):
            for method in RANGES:
                rows.append(measure(path, method, options, Path(name)))
                if not options.json:
                    print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    if options.json:
        print(json.dumps({"schema_version": 1, "scheme": options.scheme, "target": options.target, "models": rows}, indent=2))


if __name__ == "__main__":
    main()
