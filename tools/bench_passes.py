"""What each pass brings: metric and SQNR of many pipelines on the same samples, plain and with transplanted outliers.

python tools/bench_passes.py                                        models/, all schemes (long: select with the options below)
python tools/bench_passes.py --models DIR --model char_gpt --scheme w4a4 --scheme w8a8 --pipeline none --pipeline rotate
python tools/bench_passes.py --cells RESULTS.json                   resumable: cells that the file holds are not run again

DIR holds NAME.onnx; the data folder (`--calib`, default DIR) NAME.calib.npz, and NAME.eval.npz with `labels` for the metric.  The
`best` line of a table is the pipeline with the highest SQNR on the calibration samples: nothing is chosen on what is reported.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qcompile.calib.data import load_data  # noqa: E402
from qcompile.compile import Options  # noqa: E402
from qcompile.compile import compile as compile_model  # noqa: E402
from qcompile.errors import QcompileError  # noqa: E402
from qcompile.evaluate import evaluate  # noqa: E402
from qcompile.ir.model import Model  # noqa: E402
from qcompile.pipeline import registry  # noqa: E402
from tools.transplant import transplant  # noqa: E402

SCHEMA_VERSION = 1
SCHEMES = ("w8a8", "w6a6", "w4a8", "w4a4", "w4a16")
PIPELINES: dict[str, str] = {
    "none": "",
    "smooth": "smooth{search}",
    "repq": "repq",
    "center": "center",
    "rotate": "rotate",
    "rotate+r4": "rotate{r4=block}",
    "equalize": "equalize",
    "split-shortcut": "split-shortcut",
    "bias-correct": "bias-correct",
    "default": "smooth{search},bias-correct",
    "center+default": "center,smooth{search},bias-correct",
    "rotate+default": "rotate{r4=block},smooth{search},bias-correct",
    "cnn": "equalize,bias-correct",
    "unet": "split-shortcut,equalize,smooth{search},bias-correct",
}


@dataclass(frozen=True)
class Case:
    """One cell of the table."""

    model: str
    variant: str
    scheme: str
    pipeline: str

    @property
    def key(self) -> str:
        """The name under which the cell is stored."""
        return f"{self.model}/{self.variant}/{self.scheme}/{self.pipeline}"


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The selected cells, model by model."""
    stems = options.model or sorted(p.stem for p in options.models.glob("*.onnx") if _data(options, p.stem, "calib") is not None)
    for model in stems:
        for variant in options.variant or ("plain", "outliers"):
            for scheme in options.scheme or SCHEMES:
                yield from (Case(model, variant, scheme, p) for p in options.pipeline or PIPELINES)


def _data(options: argparse.Namespace, stem: str, part: str) -> Path | None:
    path = (options.calib or options.models) / f"{stem}.{part}.npz"
    return path if path.is_file() else None


def run(case: Case, source: Path, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compile and evaluate one cell; what fails is a cell with the reason."""
    out, start = folder / "candidate.onnx", time.perf_counter()
    calib = _data(options, case.model, "calib")
    passes = PIPELINES.get(case.pipeline, case.pipeline)
    settings = Options(
        passes=passes,
        scheme=case.scheme,
        target=options.target,
        calib=str(calib),
        samples=options.samples,
        output=out,
        verify="end",
        threads=options.threads,
    )
    try:
        result = compile_model(source, settings)
        found = evaluate(source, out, dataset(case, source, options), threads=options.threads)
    except QcompileError as e:
        return {"passes": passes, "error": str(e).splitlines()[0]}
    applied = sum(r.kind == "applied" for p in result.passes if p.spec in passes for r in p.remarks)
    metrics = {k: v for k, v in found["candidate"].items() if k in ("top1", "nll", "mse")}
    reference = {k: v for k, v in found["reference"].items() if k in ("top1", "nll", "mse")}
    return {
        "passes": passes,
        "applied": applied,
        "sqnr_db": found["sqnr_db"],
        "calibration_sqnr_db": result.sqnr_db,
        "metrics": metrics,
        "float_metrics": reference,
        "samples": found["samples"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def dataset(case: Case, source: Path, options: argparse.Namespace) -> Any:
    """The samples that are reported on: NAME.eval.npz, else those for calibration."""
    path = _data(options, case.model, "eval") or _data(options, case.model, "calib")
    return load_data(str(path), Model.load(source).inputs(), samples=options.eval_samples)


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All selected cells, those already stored included; every new one is written at once."""
    cells: dict[str, dict[str, Any]] = {}
    if options.cells is not None and options.cells.is_file():
        cells = json.loads(options.cells.read_text(encoding="utf-8"))["cells"]
    selected = list(cases(options))
    with tempfile.TemporaryDirectory() as name:
        for i, case in enumerate(selected):
            if case.key in cells:
                continue
            print(f"{i + 1}/{len(selected)} {case.key}", file=sys.stderr)
            cells[case.key] = run(case, prepared(case, options, Path(name)), options, Path(name))
            if options.cells is not None:
                options.cells.write_text(json.dumps(document(cells, options), indent=1), encoding="utf-8")
    return {c.key: cells[c.key] for c in selected}


def prepared(case: Case, options: argparse.Namespace, folder: Path) -> Path:
    """The model file of a variant; made once."""
    plain = options.models / f"{case.model}.onnx"
    path = folder / f"{case.model}.{case.variant}.onnx"
    if case.variant == "plain":
        return plain
    if not path.exists():
        transplant(Model.load(plain)).save(path)
    return path


def document(cells: dict[str, dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The JSON form."""
    return {"schema_version": SCHEMA_VERSION, "target": options.target, "samples": options.samples, "cells": cells}


def table(cells: dict[str, dict[str, Any]]) -> str:
    """One line a cell; the best of each scheme by calibration SQNR is marked."""
    lines: list[str] = []
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for key, cell in cells.items():
        group, _, pipeline = key.rpartition("/")
        groups.setdefault(group, {})[pipeline] = cell
    for group, held in groups.items():
        good = {p: c for p, c in held.items() if "error" not in c and c["calibration_sqnr_db"] is not None}
        best = max(good, key=lambda p: good[p]["calibration_sqnr_db"], default=None)
        float_metrics = next((_metrics(c["float_metrics"]) for c in good.values()), "")
        lines.append(f"{group}  float {float_metrics}")
        lines += [_line(p, c, p == best) for p, c in held.items()]
    return "\n".join(lines)


def _line(pipeline: str, cell: dict[str, Any], best: bool) -> str:
    if "error" in cell:
        return f"  {pipeline:<18} {cell['error']}"
    mark = " best on calibration data" if best else ""
    sqnr = "-" if cell["sqnr_db"] is None else f"{cell['sqnr_db']:.2f}"
    return f"  {pipeline:<18} {sqnr:>7} dB  {_metrics(cell['metrics'])}  {cell['applied']} sites{mark}"


def _metrics(metrics: dict[str, float]) -> str:
    return "  ".join(f"{k} {v:.4f}" for k, v in metrics.items())


def parser() -> argparse.ArgumentParser:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", type=Path, default=ROOT / "models", help="folder of NAME.onnx")
    p.add_argument("--calib", type=Path, help="folder of NAME.calib.npz and NAME.eval.npz")
    p.add_argument("--model", action="append", help="only this one (repeatable)")
    p.add_argument("--scheme", action="append", help="only this one (repeatable)")
    p.add_argument("--variant", action="append", choices=("plain", "outliers"))
    p.add_argument("--pipeline", action="append", help=f"{', '.join(PIPELINES)}, or any pipeline string")
    p.add_argument("--target", default="rtx", choices=("trt", "rtx", "ort"))
    p.add_argument("--samples", type=int, default=64)
    p.add_argument("--eval-samples", type=int)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--cells", type=Path, help="JSON file that keeps finished cells")
    p.add_argument("--json", action="store_true")
    return p


def main() -> None:
    """Measure and print."""
    options = parser().parse_args()
    for name in (p for p in options.pipeline or () if p not in PIPELINES):
        registry.parse(name)
    cells = measure(options)
    print(json.dumps(document(cells, options), indent=2) if options.json else table(cells))


if __name__ == "__main__":
    main()
