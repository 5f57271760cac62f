"""Kill calibrations at random points and compare what they end with: python tools/kill_calibration.py [--kills 20] [--json]

Four victims in turn: the process itself, a worker of its pool, a worker of a dask cluster, and the client of that cluster.
A run whose process was killed is started again with the same command.  Every final file must be, byte for byte, the one
of an undisturbed run in a single process.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "vit_digits.onnx"
VICTIMS = ("process", "pool worker", "dask worker", "dask client")
PORT = 18786


def command(output: Path, samples: int, *extra: str) -> list[str]:
    options = ["--target", "ort", "--calib", "random", "--samples", str(samples), "--threads", "1", "-o", str(output)]
    return [sys.executable, "-m", "qcompile", "calibrate", str(MODEL), *options, *extra]


def start_cluster(folder: Path) -> list[subprocess.Popen[bytes]]:
    """A scheduler and two workers, each under a nanny that replaces it."""
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder}
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", str(PORT), "--no-dashboard"]
    scheduler = subprocess.Popen(dask, **quiet)
    worker = [
        sys.executable,
        "-m",
        "distributed.cli.dask_worker",
        f"tcp://127.0.0.1:{PORT}",
        "--nworkers",
        "2",
        "--nthreads",
        "1",
    ]
    return [scheduler, subprocess.Popen([*worker, "--no-dashboard"], **quiet)]


def extra_options(victim: str) -> list[str]:
    if victim == "process":
        return []
    return ["--workers", "2"] if victim == "pool worker" else ["--dask", f"tcp://127.0.0.1:{PORT}"]


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Python processes below that do the work (not resource trackers or nannies)."""
    below = process.children(recursive=True)
    return [p for p in below if not p.children() and "resource_tracker" not in " ".join(p.cmdline())]


def pick(victim: str, main: psutil.Process, cluster: list[subprocess.Popen[bytes]]) -> psutil.Process | None:
    if victim in ("process", "dask client"):
        return main
    parent = main if victim == "pool worker" else psutil.Process(cluster[1].pid)
    workers = workers_of(parent)
    return random.choice(workers) if workers else None


def one_kill(
    victim: str, output: Path, samples: int, seconds: float, cluster: list[subprocess.Popen[bytes]]
) -> dict[str, object]:
    words = command(output, samples, *extra_options(victim))
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    main = psutil.Process(process.pid)
    delay = random.uniform(0.2, 1.0) * seconds
    time.sleep(delay)
    hit = pick(victim, main, cluster) if process.poll() is None else None
    if hit is not None:
        hit.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=600)
    kept = output.exists()
    restarts = 0
    while process.returncode != 0:
        restarts += 1
        if restarts > 3:
            raise SystemExit(f"{victim}: exit code {process.returncode}\n{errors.decode()}")
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        _, errors = process.communicate(timeout=600)
    return {"victim": victim, "after_s": round(delay, 2), "hit": hit is not None, "file_there": kept, "restarts": restarts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--victims", default=",".join(VICTIMS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    random.seed(options.seed)
    victims = options.victims.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        subprocess.run(command(folder / "whole.qstats", options.samples), check=True, capture_output=True)
        seconds = time.perf_counter() - start
        expected = (folder / "whole.qstats").read_bytes()
        cluster = start_cluster(folder) if any(v.startswith("dask") for v in victims) else []
        try:
            kills = []
            for i in range(options.kills):
                output = folder / f"{i}.qstats"
                kill = one_kill(victims[i % len(victims)], output, options.samples, seconds, cluster)
                kill["identical"] = output.read_bytes() == expected
                kills.append(kill)
                print(json.dumps(kill), file=sys.stderr, flush=True)
        finally:
            for part in reversed(cluster):
                part.terminate()
                part.wait(timeout=30)
    document = {"schema_version": 1, "undisturbed_s": round(seconds, 2), "bytes": len(expected), "kills": kills}
    bad = [k for k in kills if not k["identical"]]
    if options.json:
        print(json.dumps(document, indent=2))
    else:
        print(f"{len(kills)} kills, {sum(bool(k['hit']) for k in kills)} hit a running process, {len(bad)} ended in other bytes")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
