"""Kill calibrations at random points and compare what they end with: python tools/kill_calibration.py [--kills 20] [--json]

Four victims in turn: the process itself, a worker of its pool, a worker of a dask cluster, and the client of that cluster.
A run whose process was killed is started again with the same command; runs that end before the kill do not count.
Every final file must be, byte for byte, the one of an undisturbed run in a single process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "vit_digits.onnx"
VICTIMS = ("process", "pool worker", "dask worker", "dask client")
PORT = 18786
ATTEMPTS = 3  # runs for each kill: some end before it comes


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


def pick(victim: str, process: subprocess.Popen[bytes], cluster: list[subprocess.Popen[bytes]]) -> psutil.Process | None:
    """Whom to kill, as soon as there is one; None once the process has ended."""
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            main = psutil.Process(process.pid)
            if victim in ("process", "dask client"):
                return main
            if workers := workers_of(main if victim == "pool worker" else psutil.Process(cluster[1].pid)):
                return random.choice(workers)
        time.sleep(0.05)
    return None


def ended_after(process: subprocess.Popen[bytes], seconds: float) -> float | None:
    """Seconds until the process ended by itself; None if it still runs."""
    start = time.perf_counter()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    return time.perf_counter() - start


def one_kill(
    victim: str, output: Path, samples: int, took: dict[str, float], cluster: list[subprocess.Popen[bytes]]
) -> dict[str, object]:
    """One disturbed run; `took` learns how long a run with this victim takes when the kill came too late."""
    words = command(output, samples, *extra_options(victim))
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    delay = random.uniform(0.2, 1.0) * took[victim]
    ended = ended_after(process, delay)
    hit = pick(victim, process, cluster)
    took[victim] = ended or took[victim]
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
        kills, took = list[dict[str, object]](), dict.fromkeys(victims, seconds)
        try:
            while sum(bool(k["hit"]) for k in kills) < options.kills and len(kills) < ATTEMPTS * options.kills:
                output = folder / f"{len(kills)}.qstats"
                kill = one_kill(victims[len(kills) % len(victims)], output, options.samples, took, cluster)
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
        hits = Counter(str(k["victim"]) for k in kills if k["hit"])
        print(f"{len(kills)} runs, {hits.total()} killed ({', '.join(f'{n} {v}' for v, n in hits.items())})")
        print(f"{len(bad)} ended in other bytes than the undisturbed run")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
