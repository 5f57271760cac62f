"""Calibration beside plain inference, and beside onnxruntime.quantization's calibrators on the same samples.

    python tools/bench_calibration.py [--models FOLDER] [--data FOLDER] [--only NAME ...] [--samples N] [--runs N]
                                      [--threads N] [--no-peers] [--no-vit] [--json]

For each FOLDER/NAME.onnx with data (NAME.calib.npz beside it, or NAME.npz in --data), and a generated ViT-B-sized graph:

    min-max, histogram   of the tensors that the default trt pipeline quantizes; 4096 bins serve percentile, entropy and MSE
    second moment        X^T X of the input of every linear layer (none where there is no such layer)
    ratio                time of the sweep / of plain inference, batch 8 (ViT: 1), one process, random order, no spinning
    memory               peak resident memory of a histogram sweep over 1,024 samples / over 64, each in its own process
    peers                wall time / plain inference and peak memory of onnxruntime's calibrators, each in its own process
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator
from rich.console import Console
from rich.table import Table

from qcompile.calib.data import Dataset, find_beside, fixed_batch, load_data
from qcompile.calib.observe import Histogram, MinMax, Probe, SecondMoment
from qcompile.calib.sweep.sweep import Sweep, batch_size, sweep
from qcompile.execute.session import make_session
from qcompile.ir.model import Model
from qcompile.ir.ops import weight_slot
from qcompile.pipeline.base import PassContext
from qcompile.verbs.compile.job import prepare
from qcompile.verbs.compile.options import Options

BATCH, FEW, MANY = 8, 64, 1024
PEERS = {"minmax": CalibrationMethod.MinMax, "percentile": CalibrationMethod.Percentile, "entropy": CalibrationMethod.Entropy}
LINEAR = ("Gemm", "MatMul")


def probed(path: Path) -> tuple[Model, list[str], list[str]]:
    """The model as `annotate` sees it, the tensors that it probes for target trt, and the inputs of its linear layers."""
    job = prepare(path, Options(target="trt", scheme="w8a8", calib="random"))
    model, ctx = job.model.clone(), PassContext(job.scheme, job.target)
    tensors: list[str] = []
    for p in job.plan.passes:
        needed = list(p.probes(model, ctx))
        if p.name == "annotate":
            tensors = list(dict.fromkeys(probe.tensor for probe in needed))
            break
        if not needed:
            p.apply(model, ctx)
    linear = [n.inputs[0] for n in model.graph if n.op_type in LINEAR and weight_slot(n) is not None]
    return model, tensors, list(dict.fromkeys(str(v.name) for v in linear if v is not None))


def questions(path: Path) -> tuple[Model, dict[str, list[Probe]]]:
    """What each sweep asks."""
    model, tensors, linear = probed(path)
    asked = {
        "minmax": [Probe(t, MinMax()) for t in tensors],
        "histogram": [Probe(t, Histogram()) for t in tensors],
        "second_moment": [Probe(t, SecondMoment()) for t in linear],
    }
    return model, {name: probes for name, probes in asked.items() if probes}


def ratios(path: Path, data: Dataset, threads: int, runs: int) -> dict[str, Any]:
    """Times of the sweeps over `data`, x plain inference (minima, medians, and of the process's CPU time)."""
    model, asked = questions(path)
    size = batch_size(model, data, BATCH)
    session = make_session(model.to_proto().SerializeToString(), qdq_fusion=False, threads=threads)
    wanted = {i.name for i in session.get_inputs()}

    def plain() -> None:
        for feeds in data.batches(size):
            session.run(None, {k: v for k, v in feeds.items() if k in wanted})

    def asking(probes: list[Probe]) -> Callable[[], None]:
        one = Sweep(model, data, probes, size, threads)
        return lambda: _answer(one, len(data))

    timed = timings({"plain": plain} | {name: asking(probes) for name, probes in asked.items()}, runs)
    found: dict[str, Any] = {"tensors": len(asked["minmax"]), "linears": len(asked.get("second_moment", ())), "batch": size}
    found["plain_ms"] = 1e3 * min(timed["plain"][0]) * size / len(data)
    for name in asked:
        wall, cpu = (list(zip(timed[name][i], timed["plain"][i], strict=True)) for i in (0, 1))
        found[f"{name}_ratio"] = min(a for a, _ in wall) / min(b for _, b in wall)
        found[f"{name}_ratio_median"] = statistics.median(a for a, _ in wall) / statistics.median(b for _, b in wall)
        found[f"{name}_ratio_cpu"] = min(a for a, _ in cpu) / min(b for _, b in cpu)
    return found


def _answer(one: Sweep, samples: int) -> None:
    one.run({p: p.observer.empty() for p in one.probes}, 0, samples)


def timings(jobs: dict[str, Callable[[], None]], runs: int) -> dict[str, tuple[list[float], list[float]]]:
    """Wall and CPU seconds of every run, in a new random order each round, after one to warm up."""
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in jobs}
    order = list(jobs)
    for round_ in range(runs + 1):
        random.shuffle(order)
        for name in order:
            wall, cpu = time.perf_counter(), time.process_time()
            jobs[name]()
            if round_:
                taken[name][0].append(time.perf_counter() - wall)
                taken[name][1].append(time.process_time() - cpu)
    return taken


def repeated(data: Dataset, samples: int) -> Dataset:
    """As many samples, over and over the same ones."""
    return replace(data, index=tuple(data.index[i % len(data)] for i in range(samples)))


def peak_of(work: str, path: Path, source: str, samples: int, threads: int) -> dict[str, float]:
    """Seconds and peak megabytes of one piece of work in a process of its own."""
    command = [sys.executable, __file__, "--work", work, "--model", str(path), "--data", source]
    done = subprocess.run([*command, "--samples", str(samples), "--threads", str(threads)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{work} on {path.stem} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def work(name: str, path: Path, source: str, samples: int, threads: int) -> None:
    """What a process of its own does: prints seconds and peak megabytes."""
    model = Model.load(path)
    data = repeated(load_data(source, model.inputs()), samples)
    start = time.perf_counter()
    if name in PEERS:
        _peer(name, path, data, fixed_batch(model.inputs()) or BATCH)
    else:
        copy, asked = questions(path)
        start = time.perf_counter()
        sweep(copy, data, asked[name], batch=BATCH, threads=threads)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mb": _peak_mb()}))


def _peak_mb() -> float:
    """VmHWM where there is one: ru_maxrss starts at the resident memory of the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class _Reader(CalibrationDataReader):
    def __init__(self, data: Dataset, size: int) -> None:
        self.batches: Iterator[dict[str, NDArray[Any]]] = data.batches(size)

    def get_next(self) -> Any:
        return next(self.batches, None)


def _peer(name: str, path: Path, data: Dataset, size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        types = ["Conv", "Gemm", "MatMul"]
        calibrator = create_calibrator(path, types, f"{folder}/augmented.onnx", PEERS[name])
        calibrator.collect_data(_Reader(data, size))
        calibrator.compute_data()


def measure(path: Path, source: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model's row."""
    data = load_data(source, Model.load(path).inputs())
    one_by_one = fixed_batch(Model.load(path).inputs()) == 1
    samples, runs = (len(data), max(3, args.runs // 5)) if one_by_one else (args.samples, args.runs)
    row: dict[str, Any] = {"name": path.stem, **ratios(path, repeated(data, samples), args.threads, runs)}
    peaks = [peak_of("histogram", path, source, n, args.threads) for n in (FEW, MANY if args.memory else FEW)]
    row["memory_ratio_1024_to_64"] = peaks[1]["peak_mb"] / peaks[0]["peak_mb"] if args.memory else None
    row["peak_mb"] = peaks[0]["peak_mb"]
    plain_seconds = row["plain_ms"] / 1e3 * FEW / row["batch"]
    row["peers"] = {} if args.no_peers else {p: _peer_row(p, path, source, plain_seconds, args) for p in PEERS}
    return row


def _peer_row(peer: str, path: Path, source: str, plain_seconds: float, args: argparse.Namespace) -> dict[str, float]:
    found = peak_of(f"{peer}", path, source, FEW, args.threads)
    return {"ratio": found["seconds"] / plain_seconds, **found}


def models(args: argparse.Namespace, folder: Path) -> Iterator[tuple[Path, str]]:
    """Models with their data; the generated one last."""
    for path in sorted(args.models.glob("*.onnx")):
        source = find_beside(path)
        if args.data is not None and (beside := args.data / f"{path.stem}.npz").exists():
            source = str(beside)
        if source is not None and (not args.only or path.stem in args.only):
            yield path, source
    if not args.no_vit:
        path = folder / "vit_b.onnx"
        onnx.save(graphs.vit_b(), path)
        np.savez(folder / "vit_b.npz", input=graphs.pictures(16))
        yield path, str(folder / "vit_b.npz")


def _figure(row: dict[str, Any], kind: str) -> str:
    """Nothing where a model has no tensor to ask this of (second moments: no linear layer)."""
    return f"{row[f'{kind}_ratio']:.2f} ({row[f'{kind}_ratio_median']:.2f})" if f"{kind}_ratio" in row else ""


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table for people."""
    table = Table(
        "model", "plain ms", "min-max", "histogram", "second moment", "memory 1024/64", "peak MB", "onnxruntime: x plain, MB"
    )
    for r in rows:
        figures = [_figure(r, kind) for kind in ("minmax", "histogram", "second_moment")]
        growth = "" if r["memory_ratio_1024_to_64"] is None else f"{r['memory_ratio_1024_to_64']:.3f}"
        peers = ", ".join(f"{k} {v['ratio']:.1f}x {v['peak_mb']:.0f}" for k, v in r["peers"].items())
        table.add_row(r["name"], f"{r['plain_ms']:.1f}", *figures, growth, f"{r['peak_mb']:.0f}", peers)
    Console(width=180).print(table)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(__file__).parent.parent / "models")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--no-vit", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.model, str(args.data), args.samples, args.threads)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for path, source in models(args, Path(folder)):
            print(f"{path.stem} ...", file=sys.stderr)
            rows.append(measure(path, source, args))
    print(json.dumps({"schema_version": 1, "models": rows})) if args.json else show(rows)


if __name__ == "__main__":
    main()
