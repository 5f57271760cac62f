"""What each pass brings: metric and SQNR of many pipelines on the same samples, plain and with transplanted outliers.

python tools/bench_passes.py                                        models/, all schemes (long: select with the options below)
python tools/bench_passes.py --models DIR --model char_gpt --scheme w4a4 --scheme w8a8 --pipeline none --pipeline rotate
python tools/bench_passes.py --cells RESULTS.json                   resumable: cells that the file holds are not run again

DIR holds NAME.onnx; the data folder (`--calib`, default DIR) NAME.calib.npz, and NAME.eval.npz with `labels` for the metric.
An encoder's NAME.pairs.npy holds one human score for the evaluation samples 2i and 2i + 1: the metric is Spearman's rank
correlation with the cosine of their embeddings.  The `best` line of a table is the pipeline with the highest SQNR on the
calibration samples: nothing is chosen on what is reported.  A pipeline that makes the same file as one before it is not evaluated
again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata as ranks

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qcompile.calib.data import Dataset, load_data  # noqa: E402
from qcompile.errors import QcompileError  # noqa: E402
from qcompile.execute.opening import open_model  # noqa: E402
from qcompile.execute.session import run_batches  # noqa: E402
from qcompile.ir.atomic import write_atomic  # noqa: E402
from qcompile.ir.model import Model  # noqa: E402
from qcompile.pipeline import registry  # noqa: E402
from qcompile.target.catalog import TARGETS  # noqa: E402
from qcompile.verbs.compile.options import Options  # noqa: E402
from qcompile.verbs.compile.run import compile as compile_model  # noqa: E402
from qcompile.verbs.evaluate.outputs import evaluate  # noqa: E402
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
    "default": "smooth{search},split-shortcut{gain=6},bias-correct",
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
        return f"{self.group}/{self.pipeline}"

    @property
    def group(self) -> str:
        """The cells that are compared with each other."""
        return f"{self.model}/{self.variant}/{self.scheme}"


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


def run(case: Case, source: Path, options: argparse.Namespace, folder: Path, made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Compile and evaluate one cell; what fails is a cell with the reason.  `made`: the group's cells by their file's digest."""
    out, start = folder / "candidate.onnx", time.perf_counter()
    passes = PIPELINES.get(case.pipeline, case.pipeline)
    settings = Options(
        passes=passes,
        scheme=case.scheme,
        target=options.target,
        calib=str(_data(options, case.model, "calib")),
        samples=options.samples,
        output=out,
        verify="end",
        threads=options.threads,
    )
    try:
        result = compile_model(source, settings)
        digest = Model.load(out).digest()
        found = made[digest] if digest in made else judged(case, source, out, options)
    except QcompileError as e:
        return {"passes": passes, "error": str(e).splitlines()[0]}
    applied = sum(r.kind == "applied" for p in result.passes if p.spec in passes for r in p.remarks)
    made[digest] = found | {
        "passes": passes,
        "applied": applied,
        "calibration_sqnr_db": result.sqnr_db,
        "digest": digest,
        "seconds": round(time.perf_counter() - start, 1),
    }
    return made[digest]


def judged(case: Case, source: Path, candidate: Path, options: argparse.Namespace) -> dict[str, Any]:
    """SQNR, metrics and the share of equal top-1 answers on the evaluation samples."""
    data = dataset(case, source, options)
    found = evaluate(source, candidate, data, threads=options.threads)
    metrics = [dict(side.metrics) for side in (found.candidate, found.reference)]
    pairs = (options.calib or options.models) / f"{case.model}.pairs.npy"
    if pairs.is_file():
        metrics = [m | {"spearman": pair_spearman(p, data, pairs)} for m, p in zip(metrics, (candidate, source), strict=True)]
    elif not metrics[0] and found.agreement is not None:
        metrics = [{"agreement": found.agreement}, {"agreement": 1.0}]
    return {"sqnr_db": found.sqnr_db, "metrics": metrics[0], "float_metrics": metrics[1], "samples": found.samples}


def pair_spearman(path: Path, data: Dataset, scores: Path) -> float:
    """Spearman's rank correlation of human scores with the cosine of the embeddings [N, D] of samples 2i and 2i + 1."""
    session = open_model(Model.load(path), threads=1)
    made = np.concatenate([batch[0] for batch in run_batches(session, data, 16)])
    unit = made / np.linalg.norm(made, axis=-1, keepdims=True)
    cosine, human = (unit[0::2] * unit[1::2]).sum(-1), np.load(scores, allow_pickle=False)
    return float(np.corrcoef(ranks(cosine), ranks(human[: len(cosine)]))[0, 1])


def dataset(case: Case, source: Path, options: argparse.Namespace) -> Dataset:
    """The samples that are reported on: NAME.eval.npz, else those for calibration."""
    path = _data(options, case.model, "eval") or _data(options, case.model, "calib")
    paired = ((options.calib or options.models) / f"{case.model}.pairs.npy").is_file()
    data = load_data(str(path), Model.load(source).inputs(), samples=None)
    return data if paired or options.eval_samples is None else data.take(min(options.eval_samples, len(data)))


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
            made = {c["digest"]: c for k, c in cells.items() if k.rpartition("/")[0] == case.group and "digest" in c}
            cells[case.key] = run(case, prepared(case, options, Path(name)), options, Path(name), made)
            if options.cells is not None:
                write_atomic(options.cells, json.dumps(document(cells, options), indent=1))
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
    kept = ("target", "samples", "eval_samples", "float_rest")
    return {"schema_version": SCHEMA_VERSION, **{k: getattr(options, k) for k in kept}, "cells": cells}


def table(cells: dict[str, dict[str, Any]]) -> Table:
    """One line a cell; the best of each scheme by calibration SQNR is marked."""
    view = Table("model / variant / scheme", "pipeline", "SQNR, dB", "metric", "float", "sites", "", box=None)
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for key, cell in cells.items():
        group, _, pipeline = key.rpartition("/")
        groups.setdefault(group, {})[pipeline] = cell
    for group, held in groups.items():
        good = {p: c for p, c in held.items() if "error" not in c and c["calibration_sqnr_db"] is not None}
        best = max(good, key=lambda p: good[p]["calibration_sqnr_db"], default=None)
        for i, (pipeline, cell) in enumerate(held.items()):
            view.add_row("" if i else group, pipeline, *_columns(cell, pipeline == best), end_section=i == len(held) - 1)
    return view


def _columns(cell: dict[str, Any], best: bool) -> tuple[str, ...]:
    if "error" in cell:
        return "-", "", "", "", cell["error"]
    sqnr = "-" if cell["sqnr_db"] is None else f"{cell['sqnr_db']:.2f}"
    mark = "best on calibration data" if best else ""
    return sqnr, _metrics(cell["metrics"]), _metrics(cell["float_metrics"]), str(cell["applied"]), mark


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
    p.add_argument("--samples", type=int, default=64, help="calibration samples")
    p.add_argument("--eval-samples", type=int, help="at most as many evaluation samples (default: all; pairs are never cut)")
    p.add_argument("--float-rest", action="store_true", help="leave the float rest in float32: half precision is slow on a CPU")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--cells", type=Path, help="JSON file that keeps finished cells")
    p.add_argument("--json", action="store_true")
    return p


def main() -> None:
    """Measure and print."""
    options = parser().parse_args()
    for name in (p for p in options.pipeline or () if p not in PIPELINES):
        registry.parse(name)
    if options.float_rest:
        variant = replace(TARGETS[options.target], name=f"{options.target}-float", half_body=False)
        options.target = TARGETS.add(variant)
    cells = measure(options)
    if options.json:
        print(json.dumps(document(cells, options), indent=2))
    else:
        Console(width=160).print(table(cells))


if __name__ == "__main__":
    main()
