"""Speed and accuracy on ONNX Runtime CPU: float, qcompile's `ort` output, onnxruntime's own quantize_static.

    python tools/bench_ort.py [--model MODEL.onnx ...] [--images FOLDER] [--passes P] [--runs N] [--threads N] [--json]

Without --model: ViT-tiny and ResNet-18 shaped graphs with random weights (tools/graphs.py).  Pictures are the first 160 of the
folder, in order of their names, as (x / 255 - 0.5) / 0.5 (made up without --images): 128 calibrate, 32 measure the SQNR
of the logits.  Times are of one picture, in random order, without spinning threads; an idle machine gives the steadiest ratios.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

import qcompile
from qcompile.calib.data import load_data
from qcompile.execute.timing import Ratio, Timing
from qcompile.ir.model import Model
from qcompile.verbs.bench.models import bench
from qcompile.verbs.evaluate.outputs import Evaluation, evaluate

CALIBRATION, MEASURED = 128, 32
PICTURES = {".jpeg", ".jpg", ".png"}


def read_pictures(folder: Path, n: int) -> NDArray[np.float32]:
    """[n, 3, 224, 224] in [-1, 1]."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)[:n]
    raw = np.stack([np.asarray(Image.open(f).convert("RGB"), np.float32) for f in files])
    return np.ascontiguousarray(((raw / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2))


def save_data(folder: Path, images: Path | None, name: str) -> tuple[Path, Path]:
    """`.npz` files of the calibration and of the measured pictures."""
    n = CALIBRATION + MEASURED
    x = read_pictures(images, n) if images is not None else graphs.pictures(n)
    calibration, measured = folder / "calibration.npz", folder / "measured.npz"
    np.savez(calibration, **{name: x[:CALIBRATION]})
    np.savez(measured, **{name: x[CALIBRATION:]})
    return calibration, measured


def by_qcompile(passes: str | None) -> Callable[[Path, Path, Path], None]:
    def make(model: Path, out: Path, calibration: Path) -> None:
        qcompile.compile(model, passes=passes, target="ort", scheme="w8a8", calib=str(calibration), output=out, verify="end")

    return make


def by_onnxruntime(signed: bool) -> Callable[[Path, Path, Path], None]:
    """quantize_static with per-channel weights and min-max ranges: symmetric int8, or asymmetric uint8 activations."""

    def make(model: Path, out: Path, calibration: Path) -> None:
        from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self.samples: Iterator[dict[str, NDArray[Any]]] = _samples(calibration)

            def get_next(self) -> dict[str, NDArray[Any]] | None:
                return next(self.samples, None)

        quantize_static(
            model,
            out,
            Reader(),
            per_channel=True,
            activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": signed, "WeightSymmetric": True},
        )

    return make


def _samples(path: Path) -> Iterator[dict[str, NDArray[Any]]]:
    arrays = dict(np.load(path))
    for i in range(CALIBRATION):
        yield {name: array[i : i + 1] for name, array in arrays.items()}


def compare(model: Path, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each form of `model`."""
    inputs = Model.load(model).inputs()
    calibration, measured = save_data(folder, args.images, inputs[0].name)
    forms: dict[str, Path] = {"float": model}
    for label, make in {
        "qcompile": by_qcompile(args.passes),
        "quantize_static uint8": by_onnxruntime(signed=False),
        "quantize_static int8": by_onnxruntime(signed=True),
    }.items():
        forms[label] = folder / f"{model.stem}.{label.replace(' ', '-')}.onnx"
        make(model, forms[label], calibration)
    data = load_data(str(measured), inputs)
    figures = {label: evaluate(model, path, data, threads=args.threads) for label, path in forms.items()}
    timed = bench(list(forms.values()), threads=args.threads, runs=args.runs, use=["CPUExecutionProvider"])
    rows = zip(forms.items(), figures.values(), timed.models, timed.ratios, strict=True)
    return [_row(model.stem, label, path, figure, time, ratio) for (label, path), figure, time, ratio in rows]


def _row(name: str, label: str, path: Path, figure: Evaluation, time: Timing, ratio: Ratio) -> dict[str, Any]:
    quality = {"sqnr_db": figure.sqnr_db, "agreement": figure.agreement}
    times = {"min_ms": time.min_ms, "median_ms": time.median_ms, "x_min": ratio.min, "x_median": ratio.median}
    return {"model": name, "form": label, "size_mb": path.stat().st_size / 1e6, **quality, **times}


def show(rows: list[dict[str, Any]]) -> None:
    """The table for people."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=140).print(table)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", default=[])
    parser.add_argument("--images", type=Path)
    parser.add_argument("--passes", help="default: smooth for graphs with norms, the target's default otherwise")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in args.model or _generated(Path(folder)):
            print(f"{model.stem} ...", file=sys.stderr)
            rows += compare(model, Path(folder), args)
    print(json.dumps({"schema_version": 1, "rows": rows})) if args.json else show(rows)


def _generated(folder: Path) -> list[Path]:
    paths = []
    for name, make in graphs.GRAPHS.items():
        paths.append(folder / f"{name}.onnx")
        onnx.save(make(), paths[-1])
    return paths


if __name__ == "__main__":
    main()
