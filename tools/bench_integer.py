"""Integer-only models beside Q/DQ: purity, proof, accuracy, bit-exactness, dyadic against float rounding, cost.

python tools/bench_integer.py                                    all of models/
python tools/bench_integer.py --models DIR --data DIR --model resnet20_cifar10 --samples 500 --json
python tools/bench_integer.py --passes 'integer{profile=ort-fused}' --bits 'op:Conv=w4a4'

DIR holds NAME.onnx; the data folder (`--data`, default the models') NAME.calib.npz, and NAME.eval.npz with `labels` for the
metric.  Both models are w8a8 with the default passes; options change the integer one.  `--keep FOLDER` keeps the compiled models.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qcompile.calib.data import Dataset, load_data  # noqa: E402
from qcompile.errors import QcompileError  # noqa: E402
from qcompile.ir.model import Model  # noqa: E402
from qcompile.oracle.fuse import Layer, layers  # noqa: E402
from qcompile.oracle.graph import IntegerGraph, integer_graph  # noqa: E402
from qcompile.oracle.run import encode, run_integer  # noqa: E402
from qcompile.verbs.check import check_file  # noqa: E402
from qcompile.verbs.compile.options import Options  # noqa: E402
from qcompile.verbs.compile.run import compile as compile_model  # noqa: E402
from qcompile.verbs.evaluate.conformance import conformance  # noqa: E402
from qcompile.verbs.evaluate.outputs import Evaluation, evaluate  # noqa: E402

SCHEMA_VERSION = 1
METRICS = ("top1", "nll", "mse")
ROUNDED, BATCH = 32, 8
Array = NDArray[Any]


@dataclass
class Apart:
    """Codes of one width that dyadic and float32 rounding make: how many, how many differ, by how much at most."""

    codes: int = 0
    differ: int = 0
    most: int = 0

    def add(self, ours: Array, real: Array) -> None:
        """Count one tensor."""
        distance = np.abs(ours.astype(np.int64) - real)
        self.codes += distance.size
        self.differ += int((distance > 0).sum())
        self.most = max(self.most, int(distance.max(initial=0)))

    def to_json(self) -> dict[str, Any]:
        """The keys codes, differ, rate, most."""
        return {**vars(self), "rate": self.differ / self.codes if self.codes else None}


def rounding(graph: IntegerGraph, data: Dataset) -> dict[str, dict[str, Any]]:
    """Every requantization with one multiplier, redone in float32 (half to even) from the same integers, by stored width."""
    made = [x for x in layers(graph) if x.op == "requantize" and x.inputs[0] not in graph.constants]
    steps = [x for x in made if "m" in x.parameters and "low" in x.parameters]
    taps = tuple(dict.fromkeys(name for x in steps for name in (*x.inputs, *x.outputs)))
    tapped, found = replace(graph, outputs=(*graph.outputs, *taps)), dict[str, Apart]()
    for batch in data.batches(BATCH):
        values = run_integer(tapped, encode(graph, batch))
        for step in steps:
            real = in_float(step, values[step.inputs[0]])
            found.setdefault(_width(step), Apart()).add(values[step.outputs[0]], real)
    return {name: apart.to_json() for name, apart in sorted(found.items())}


def _width(step: Layer) -> str:
    span = int(np.max(step.parameters["high"])) - int(np.min(step.parameters["low"]))
    return "8 bit" if span < 1 << 8 else "16 bit"


def in_float(step: Layer, x: Array) -> Array:
    """clip(rint(float32(x - z) * float32(m / 2^e) + float32(offset / 2^e)) + zero): ONNX Runtime's way to requantize."""
    p = step.parameters
    e = p["e"].astype(np.int64)
    ratio, offset = (np.ldexp(p.get(role, np.asarray(0)).astype(np.float64), -e).astype(np.float32) for role in ("m", "offset"))
    real = (x.astype(np.int64) - p.get("x_zero_point", np.asarray(0))).astype(np.float32) * ratio + offset
    return np.clip(np.rint(real).astype(np.int64) + p.get("zero_point", np.asarray(0)), p["low"], p["high"])


# ---- one model ----------------------------------------------------------------------------------------------------


def run(stem: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The row of one model; what fails is a row with the reason."""
    source, start = options.models / f"{stem}.onnx", time.perf_counter()
    paths = {target: folder / f"{stem}.{target}.onnx" for target in ("ort", "integer")}
    try:
        _compile(source, paths["ort"], "ort", options)
        _compile(source, paths["integer"], "integer", options)
        return {**_figures(source, paths, options), "seconds": round(time.perf_counter() - start, 1)}
    except QcompileError as e:
        return {"error": str(e).splitlines()[0]}


def _compile(source: Path, out: Path, target: str, options: argparse.Namespace) -> None:
    own: dict[str, Any] = (
        {"passes": options.passes, "bits": tuple(options.bits or ()), "scheme": options.scheme} if target == "integer" else {}
    )
    calib = str(options.data / f"{source.stem}.calib.npz")
    compile_model(source, Options(target=target, calib=calib, output=out, verify="end", threads=options.threads, **own))


def _figures(source: Path, paths: Mapping[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    data, path = dataset(source, options, options.samples), paths["integer"]
    qdq, whole = (evaluate(source, p, data, threads=options.threads) for p in (paths["ort"], path))
    exact = conformance(path, dataset(source, options, options.exact or options.samples), threads=options.threads)
    model = onnx.load(path)
    return {
        "samples": len(data),
        "metric": dict(whole.reference.metrics),
        "qdq": _accuracy(qdq),
        "integer": _accuracy(whole),
        **proof(path),
        "oracle": {"samples": exact.samples, "matches": exact.matches, "mismatches": exact.mismatches},
        "dyadic": rounding(integer_graph(model), dataset(source, options, options.rounded)),
        "bytes": {"float": source.stat().st_size, **{target: p.stat().st_size for target, p in paths.items()}},
        "nodes": len(model.graph.node),
    }


def _accuracy(found: Evaluation) -> dict[str, Any]:
    return {**found.candidate.metrics, "sqnr_db": found.sqnr_db, "agreement": found.agreement, "cosine": found.cosine}


def proof(path: Path) -> dict[str, Any]:
    """Float tensors inside, errors of the rules, the proof, and what the layers cost."""
    checked = check_file(path, "integer")
    errors = [f for f in checked.findings if f.severity == "error"]
    found = checked.proof
    return {
        "float_tensors": sum(f.rule == "QC-INT-001" for f in errors),
        "errors": len(errors),
        "proof_complete": found is not None and found.complete,
        "worst_margin_bits": None if found is None or found.worst is None else found.worst.margin_bits,
        "cost": None if found is None else {key: getattr(found.cost, key) for key in ("macs", "bops", "weight_bytes")},
    }


def dataset(source: Path, options: argparse.Namespace, samples: int | None) -> Dataset:
    """At most so many samples (None: all) of NAME.eval.npz, else of those for calibration."""
    found = [p for part in ("eval", "calib") if (p := options.data / f"{source.stem}.{part}.npz").is_file()]
    data = load_data(str(found[0]), Model.load(source).inputs())
    return data if samples is None else data.take(samples)


# ---- all models ---------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and row of each selected model."""
    every = sorted(p.stem for p in options.models.glob("*.onnx") if (options.data / f"{p.stem}.calib.npz").is_file())
    with tempfile.TemporaryDirectory() as scratch:
        for stem in options.model or every:
            print(stem, file=sys.stderr)
            yield stem, run(stem, options, options.keep or Path(scratch))


COLUMNS = (
    "model", "float", "Q/DQ", "integer", "floats inside", "proof, bits left", "ORT = oracle", "dyadic off by 1 (8 bit)", "MMACs",
    "GBOPs", "weights",
)  # fmt: skip


def line(stem: str, row: Mapping[str, Any]) -> str:
    """A row of the table."""
    if "error" in row:
        return f"| {stem} | {row['error']} |"
    cost, oracle, eight = row["cost"], row["oracle"], row["dyadic"].get("8 bit")
    cells = [
        stem,
        *(_metric(row[key]) for key in ("metric", "qdq", "integer")),
        str(row["float_tensors"]),
        f"{'complete' if row['proof_complete'] else 'NOT complete'}, {row['worst_margin_bits']}",
        f"{oracle['mismatches']} of {oracle['matches'] + oracle['mismatches']} differ, {oracle['samples']} samples",
        "-"
        if eight is None
        else f"{eight['differ']} of {eight['codes']}" + ("" if eight["most"] <= 1 else f", {eight['most']} apart"),
        f"{cost['macs'] / 1e6:.1f}",
        f"{cost['bops'] / 1e9:.2f}",
        f"{cost['weight_bytes'] / 1e6:.2f} MB",
    ]
    return f"| {' | '.join(cells)} |"


def _metric(found: Mapping[str, Any]) -> str:
    """The task's figure, else (and behind it) the distance to the float model."""
    own = [f"{name} {found[name]:.4f}" for name in METRICS if name in found][:1]
    return ", ".join([*own, *([] if found.get("sqnr_db") is None else [f"{found['sqnr_db']:.1f} dB"])]) or "-"


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", type=Path, default=ROOT / "models", help="folder of NAME.onnx")
    p.add_argument("--data", type=Path, help="folder of NAME.calib.npz and NAME.eval.npz")
    p.add_argument("--model", action="append", help="only this one (repeatable)")
    p.add_argument("--scheme", default="w8a8", help="of the integer model")
    p.add_argument("--passes", help="of the integer model")
    p.add_argument("--bits", action="append", help="of the integer model: SELECTOR=wXaY (repeatable)")
    p.add_argument("--samples", type=int, help="of the evaluation data; default: all")
    p.add_argument("--exact", type=int, help="samples for ONNX Runtime against the oracle; default: --samples")
    p.add_argument("--rounded", type=int, default=ROUNDED, help="samples for dyadic against float rounding")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--keep", type=Path, help="folder for the compiled models")
    p.add_argument("--json", action="store_true")
    return p


def main() -> None:
    """Measure and print."""
    options = parser().parse_args()
    options.data = options.data or options.models
    rows = dict(measure(options))
    if options.json:
        print(json.dumps({"schema_version": SCHEMA_VERSION, "scheme": options.scheme, "models": rows}, indent=2))
    else:
        head = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
        print("\n".join([*head, *(line(stem, row) for stem, row in rows.items())]))


if __name__ == "__main__":
    main()
