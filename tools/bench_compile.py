"""What it costs to make an int8 model: qcompile beside onnxruntime's quantize_static, each in a process of its own.

python tools/bench_compile.py                                      models/ and two generated graphs of well-known shapes
python tools/bench_compile.py --model M.onnx --calib DATA.npz      another model (repeatable, in pairs)
python tools/bench_compile.py --graph vit_b --samples 32 --target ort
python tools/bench_compile.py --against DIR                        another checkout instead of onnxruntime

Both read the same npz and write one INT8 Q/DQ model.  qcompile runs its default command (default pipeline, `--verify
each`).  onnxruntime runs as its documentation shows: quant_pre_process, then quantize_static with min-max ranges, Q/DQ
format, per-channel symmetric int8 and a reader of one sample a batch.  Time is that of the whole process, CPU time is
user + system over all threads, memory is the peak resident set.  With several rounds the tools take turns and each
cell is the median.  Ratios are those of the medians.  With `--out FILE` each finished run is kept there, and a second command
goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCHEMA_VERSION = 1
GENERATED = ("vit_tiny", "resnet18")
GRAPHS = (*GENERATED, "vit_b")
SHIPPED = ("vit_digits", "digits_cnn")
# The parent imports nothing large: a child's peak memory counts from its parent's.
_GENERATE = """
import sys
import numpy as np, onnx
sys.path.insert(0, sys.argv[1])
import graphs
onnx.save(graphs.GRAPHS[sys.argv[2]](), sys.argv[3])
np.savez(sys.argv[4], input=graphs.pictures(int(sys.argv[5])))
"""
QCOMPILE = "import sys; from qcompile.cli import main; sys.exit(main())"
_ORT = """
import sys
import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

source, data, prepared, out, samples = *sys.argv[1:5], int(sys.argv[5])

class Reader(CalibrationDataReader):
    def __init__(self):
        names = [i.name for i in onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"]).get_inputs()]
        with np.load(data) as stored:
            arrays = {n: stored[n] for n in names}
        total = min(len(a) for a in arrays.values())
        held = min(samples, total)
        index = (np.arange(held) * total) // held
        self.feeds = iter([{n: a[i : i + 1] for n, a in arrays.items()} for i in index])

    def get_next(self):
        return next(self.feeds, None)

try:
    quant_pre_process(source, prepared)
except Exception:  # its symbolic shape inference does not know every graph; its own advice is to skip it
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
quantize_static(
    prepared, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, calibrate_method=CalibrationMethod.MinMax,
    activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
    extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
)
"""


@dataclass(frozen=True)
class Cost:
    """Of one whole process: wall and CPU seconds, peak resident set in MB."""

    wall_s: float
    cpu_s: float
    peak_mb: float


@dataclass(frozen=True)
class Row:
    """One model: the medians of qcompile and of what it is held against."""

    model: str
    qcompile: Cost
    other: Cost

    @property
    def ratios(self) -> Cost:
        """qcompile's cost over the other's."""
        a, b = self.qcompile, self.other
        return Cost(a.wall_s / b.wall_s, a.cpu_s / b.cpu_s, a.peak_mb / b.peak_mb)


def run(command: list[str], log: Path, checkout: Path = ROOT) -> Cost:
    """Run `command` to its end with its output in `log`, importing qcompile from `checkout`.

    Raises:
        SystemExit: it failed; the message holds the end of its output.
    """
    start = time.perf_counter()
    actions = [(os.POSIX_SPAWN_OPEN, fd, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) for fd in (1, 2)]
    pid = os.posix_spawn(command[0], command, os.environ | {"PYTHONPATH": str(checkout)}, file_actions=actions)
    _, status, usage = os.wait4(pid, 0)
    wall = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(command)[:200]} failed:\n{log.read_text(errors='replace')[-2000:]}")
    peak = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e6 / 1024)
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak)


def measure(name: str, model: Path, data: Path, folder: Path, options: argparse.Namespace) -> Row:
    """Both in turns, `rounds` times, but for the runs that `--out` holds."""
    log = folder / f"{name}.log"
    commands = _commands(name, model, data, folder, options)
    known: dict[str, list[list[float]]] = _kept(options.out)
    key = " ".join([name, options.target, str(options.samples), options.against.name if options.against else "onnxruntime"])
    done = known.setdefault(key, [])
    while len(done) < options.rounds:
        pair = [run(command, log, checkout) for command, checkout in commands]
        done.append([figure for cost in pair for figure in (cost.wall_s, cost.cpu_s, cost.peak_mb)])
        if options.out is not None:
            options.out.write_text(json.dumps(known, indent=1))
    costs = [(Cost(*each[:3]), Cost(*each[3:])) for each in done]
    return Row(name, _median([a for a, _ in costs]), _median([b for _, b in costs]))


def _commands(name: str, model: Path, data: Path, folder: Path, options: argparse.Namespace) -> list[tuple[list[str], Path]]:
    """What runs, and where its qcompile is imported from."""
    out, prepared = folder / f"{name}.out.onnx", folder / f"{name}.prepared.onnx"
    given = ["--calib", str(data), "--samples", str(options.samples)]
    ours = [sys.executable, "-c", QCOMPILE, str(model), "--target", options.target, *given, "-o", str(out)]
    if options.against is not None:
        return [(ours, ROOT), (ours, options.against.resolve())]
    return [
        (ours, ROOT),
        ([sys.executable, "-c", _ORT, str(model), str(data), str(prepared), str(out), str(options.samples)], ROOT),
    ]


def _kept(out: Path | None) -> dict[str, list[list[float]]]:
    return json.loads(out.read_text()) if out is not None and out.exists() else {}


def _median(costs: list[Cost]) -> Cost:
    return Cost(*(statistics.median(getattr(c, f) for c in costs) for f in ("wall_s", "cpu_s", "peak_mb")))


def jobs(options: argparse.Namespace, folder: Path) -> list[tuple[str, Path, Path]]:
    """(name, model, data) of everything to measure; the generated graphs are written to `folder`."""
    if options.model:
        return [(m.stem, m, d) for m, d in zip(options.model, options.calib, strict=True)]
    shipped = () if options.graph else SHIPPED
    found = [(n, ROOT / "models" / f"{n}.onnx", ROOT / "models" / f"{n}.calib.npz") for n in shipped]
    for name in options.graph or GENERATED:
        model, data = folder / f"{name}.onnx", folder / f"{name}.npz"
        words = [str(ROOT / "tools"), name, str(model), str(data), str(options.samples)]
        run([sys.executable, "-c", _GENERATE, *words], folder / "generate.log")
        found.append((name, model, data))
    return found


def document(rows: list[Row], options: argparse.Namespace) -> dict[str, object]:
    """The JSON form."""
    entries = [asdict(r) | {"ratios": asdict(r.ratios)} for r in rows]
    settings = {"samples": options.samples, "rounds": options.rounds, "target": options.target, "cpus": os.cpu_count()}
    return {"schema_version": SCHEMA_VERSION, **settings, "models": entries}


def table(rows: list[Row]) -> str:
    """The same for people: one line a tool, and their ratio."""
    lines = [f"{'model':<24}{'tool':<14}{'wall s':>9}{'CPU s':>9}{'peak MB':>9}"]
    for r in rows:
        for i, (tool, cost) in enumerate((("qcompile", r.qcompile), ("other", r.other), ("ratio", r.ratios))):
            seconds, size = (".2f", ".2f") if tool == "ratio" else (".1f", ".0f")
            name = "" if i else r.model
            lines.append(f"{name:<24}{tool:<14}{cost.wall_s:>9{seconds}}{cost.cpu_s:>9{seconds}}{cost.peak_mb:>9{size}}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, action="append", default=[])
    p.add_argument("--calib", type=Path, action="append", default=[])
    p.add_argument("--graph", action="append", default=[], choices=GRAPHS)
    p.add_argument("--against", type=Path, metavar="DIR", help="a checkout of qcompile")
    p.add_argument("--out", type=Path, help="keeps what is measured")
    p.add_argument("--samples", type=int, default=128)
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--target", default="trt", choices=("trt", "rtx", "ort"))
    p.add_argument("--json", action="store_true")
    return p


def main() -> None:
    """Measure and print."""
    options = parser().parse_args()
    if len(options.model) != len(options.calib):
        sys.exit("give one --calib for each --model")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs(options, Path(folder)):
            print(f"measuring {job[0]}", file=sys.stderr)
            rows.append(measure(*job, Path(folder), options))
    print(json.dumps(document(rows, options), indent=2) if options.json else table(rows))


if __name__ == "__main__":
    main()
