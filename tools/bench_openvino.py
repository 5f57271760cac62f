"""Speed and accuracy on OpenVINO's CPU plugin: float, and qcompile's `ort` and `openvino` artefacts.

    python tools/bench_openvino.py [--models DIR ...] [--model NAME ...] [--runs N] [--threads N] [--cells FILE] [--json]

A model is NAME.onnx with NAME.calib.npz and NAME.eval.npz beside it (`labels` in the latter give top-1).  Each artefact runs
twice, in float32 (INFERENCE_PRECISION_HINT=f32) and in the plugin's default precision (bfloat16 on CPUs that have it).
"exact" is the artefact without integer kernels (ONNX Runtime, optimizations off): on CPUs without VNNI sums of u8 by i8 saturate.
Times are of one sample, all artefacts interleaved in random order; a ratio is the float32 float model's time over the row's,
of minima and of medians.  SQNR is against the float model in float32.  `--cells` keeps finished models.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import openvino as ov
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import qcompile
from qcompile.execute.metrics import sqnr_db
from qcompile.execute.timing import interleaved

ROOT = Path(__file__).parents[1]
NAMES = ("vit_digits", "digits_cnn", "minilm", "resnet20", "mobilenet")
PRECISIONS = {"f32": {"INFERENCE_PRECISION_HINT": "f32"}, "default": {}}
Feeds = dict[str, NDArray[Any]]


def opened(path: Path, feeds: Feeds, precision: str, threads: int) -> ov.CompiledModel:
    """A compiled model of the feeds' shapes."""
    core = ov.Core()
    model = core.read_model(path)
    model.reshape({name: list(x.shape) for name, x in feeds.items()})
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **PRECISIONS[precision]}
    return core.compile_model(model, "CPU", options)


def samples(path: Path, limit: int) -> tuple[list[Feeds], NDArray[Any] | None]:
    """One sample a dict, and the labels if there are any."""
    with np.load(path) as arrays:
        held = {name: arrays[name][:limit] for name in arrays.files}
    labels = held.pop("labels", None)
    return [{name: x[i : i + 1] for name, x in held.items()} for i in range(len(next(iter(held.values()))))], labels


def outputs(compiled: ov.CompiledModel, data: list[Feeds]) -> NDArray[np.float64]:
    """The first output of every sample."""
    request = compiled.create_infer_request()
    return np.stack([request.infer(feeds)[0].astype(np.float64).copy() for feeds in data])


def exact_outputs(path: Path, data: list[Feeds]) -> NDArray[np.float64]:
    """The first output of every sample, every operator computed as written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.stack([np.asarray(session.run(None, feeds)[0], np.float64) for feeds in data])


def kernels(compiled: ov.CompiledModel) -> dict[str, int]:
    """Convolutions and matrix products by the precision that they run in."""
    counts: dict[str, int] = {}
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind, ran = info["layerType"].astype(str), info["runtimePrecision"].astype(str)
        if kind in ("Convolution", "FullyConnected", "MatMul", "Subgraph"):
            counts[f"{kind} {ran}"] = counts.get(f"{kind} {ran}", 0) + 1
    return counts


def timed(compiled: dict[str, ov.CompiledModel], feeds: Feeds, runs: int) -> dict[str, list[float]]:
    """Milliseconds of each run, interleaved in random order."""
    calls = [partial(c.create_infer_request().infer, feeds) for c in compiled.values()]
    return dict(zip(compiled, interleaved(calls, runs, random.Random(0)), strict=True))


def measured(source: Path, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model."""
    paths = {"float": source}
    for target in ("ort", "openvino"):
        paths[target] = folder / f"{source.stem}.{target}.onnx"
        qcompile.compile(source, target=target, output=paths[target], samples=options.samples, threads=options.threads)
    data, labels = samples(source.with_suffix(".eval.npz"), options.eval_samples)
    compiled = {
        f"{name} {precision}": opened(path, data[0], precision, options.threads)
        for name, path in paths.items()
        for precision in PRECISIONS
    }
    times = timed(compiled, data[0], options.runs)
    base, reference = times["float f32"], outputs(compiled["float f32"], data)
    exact = {name: sqnr_db(reference, exact_outputs(path, data)) for name, path in paths.items()}
    rows: list[dict[str, Any]] = []
    for name, c in compiled.items():
        y, ms = outputs(c, data), times[name]
        rows.append(
            {
                "model": source.stem,
                "artefact": name,
                "min_ms": min(ms),
                "ratio_min": min(base) / min(ms),
                "ratio_median": float(np.median(base) / np.median(ms)),
                "sqnr_db": sqnr_db(reference, y),
                "exact_db": exact[name.split()[0]],
                "top1": None if labels is None else float((y.reshape(len(y), -1).argmax(1) == labels).mean()),
                "kernels": kernels(c),
            }
        )
    return rows


def table(rows: list[dict[str, Any]], version: str) -> Table:
    """One row an artefact."""
    made = Table(title=f"OpenVINO {version}, CPU, batch 1")
    for title in ("model", "artefact", "min ms", "ratio of minima", "of medians", "SQNR dB", "exact dB", "top-1", "kernels"):
        made.add_column(title)
    for r in rows:
        top1 = "" if r["top1"] is None else f"{100 * r['top1']:.2f}"
        times = [f"{r['min_ms']:.3f}", f"{r['ratio_min']:.2f}", f"{r['ratio_median']:.2f}"]
        ran = ", ".join(f"{n} {k}" for k, n in sorted(r["kernels"].items()))
        made.add_row(r["model"], r["artefact"], *times, f"{r['sqnr_db']:.1f}", f"{r['exact_db']:.1f}", top1, ran)
    return made


def found(name: str, folders: list[Path]) -> Path | None:
    """NAME.onnx in the first folder that has it."""
    return next((p for folder in folders if (p := folder / f"{name}.onnx").is_file()), None)


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", type=Path, action="append", help="folder of NAME.onnx (repeatable; models/ is always searched)")
    p.add_argument("--model", action="append", help=f"default: {', '.join(NAMES)}, as far as they are found")
    p.add_argument("--runs", type=int, default=200)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--samples", type=int, default=64, help="calibration samples")
    p.add_argument("--eval-samples", type=int, default=500)
    p.add_argument("--cells", type=Path, help="JSON file that keeps finished models")
    p.add_argument("--json", action="store_true")
    return p


def main() -> None:
    """Measure and print."""
    options = parser().parse_args()
    folders = [*(options.models or []), ROOT / "models"]
    cells = json.loads(options.cells.read_text()) if options.cells is not None and options.cells.is_file() else {}
    for name in options.model or NAMES:
        source = found(name, folders)
        if source is None:
            print(f"{name}: no such model in {', '.join(map(str, folders))}; give its folder with --models", file=sys.stderr)
        elif name not in cells:
            with tempfile.TemporaryDirectory() as folder:
                cells[name] = measured(source, Path(folder), options)
            if options.cells is not None:
                options.cells.write_text(json.dumps(cells, indent=1))
    rows = [row for found_rows in cells.values() for row in found_rows]
    if options.json:
        print(json.dumps({"openvino": ov.__version__, "rows": rows}, indent=2))
    else:
        Console(width=200).print(table(rows, ov.__version__.split("-")[0]))


if __name__ == "__main__":
    main()
