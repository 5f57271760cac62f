"""Detectors judged by what they detect: the default beside no passes, heads in float, and ONNX Runtime's quantize_static.

    python tools/bench_detect.py WORK --cache DIR --pictures DIR [--target ort] [--model NAME] [--images N] [--out FILE]

Every model and way is a row, kept in WORK/detections.json (or --out): a second command goes on behind it.

The detectors of zoo.toml are run on photographs, drawn pages or glyphs on photographs; boxes are decoded and thinned (NMS) as
their packages do.  `found` is the F1 of the float model's detections and the candidate's, matched by class and an overlap
(IoU) of at least one half; `tight` at 0.75; `score` the mean change of a matched score; `overlap` the mean IoU of matches;
`dB` the SQNR of the worst output.  Calibration and judging pictures differ.  Optimizations are off (integer kernels of CPUs
without VNNI saturate).  `heads` is the default with --keep-float of the heads, `quantized` with --quantize of them; `static` is
ONNX Runtime's.  `best` says whether no way finds more than half a point more than the default.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
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
from onnx import version_converter
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
    images: int = 150
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
    boxes, best, classes = (np.concatenate(part) for part in zip(*found, strict=True))
    return _kept(boxes, best, classes, least)


DETECTORS = {
    "nudenet_yolov8n": Detector(yolov8, 0.2, ("*cv[23].[012].2/Conv", "*dfl/conv/Conv"), 400),
    "doclaynet_yolov8n": Detector(yolov8, 0.3, ("*cv[23].[012].2/Conv", "*dfl/conv/Conv"), 40),
    "ddddocr_det": Detector(yolox, 0.1, tuple(f"Conv_{i}" for i in (254, 261, 262, 275, 282, 283, 296, 303, 304)), 100),
    "centerface": Detector(centerface, 0.35, ("Conv_117", "Conv_119", "Conv_120", "Conv_121"), 400, (1, 3, 224, 224)),
    "layout_cdla": Detector(picodet, 0.4, ("p2o.Conv.74", "p2o.Conv.83", "p2o.Conv.92", "p2o.Conv.101"), 40),
}

WAYS = {"default": "", "none": "", "heads": "--keep-float", "quantized": "--quantize", "static": ""}
_TIE = 0.005
_CHANNELS_FROM = 13


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
    entry, images = next(e for e in zoo.entries() if e.name == name), options.images or DETECTORS[name].images
    shape = DETECTORS[name].shape
    if shape is not None:
        entry = replace(entry, inputs={n: spec | {"shape": list(shape)} for n, spec in entry.inputs.items()})
    path = zoo.unpack(entry, options.cache, folder, options.pictures, options.samples + images)
    if path is None:
        raise SystemExit(f"no wheel in {options.cache} holds {entry.file}; bench_models.py --download fetches it")
    if shape is not None:
        _set_sizes(path, shape, set(entry.inputs))
    with np.load(path.with_suffix(".data.npz")) as held:
        (key,) = held.files
        runs = [{key: x} for x in held[key]]
    return path, runs[: options.samples], runs[options.samples :]


def _set_sizes(path: Path, shape: tuple[int, ...], inputs: set[str]) -> None:
    """Of the inputs; outputs have one picture, the rest is not known."""
    model = onnx.load(path)
    for value in (*(v for v in model.graph.input if v.name in inputs), *model.graph.output):
        sizes = shape if value.name in inputs else (1, None, None, None)
        for d, size in zip(value.type.tensor_type.shape.dim, sizes, strict=True):
            d.Clear()
            if size is not None:
                d.dim_value = size
    onnx.save(model, path)


def _raised(path: Path) -> Path:
    """At opset 13, the first whose Q/DQ have channels: quantize_static writes files that do not load below."""
    model = onnx.load(path)
    if next(o.version for o in model.opset_import if not o.domain) >= _CHANNELS_FROM:
        return path
    raised = path.with_suffix(".raised.onnx")
    onnx.save(version_converter.convert_version(model, _CHANNELS_FROM), raised)
    return raised


def made(name: str, way: str, path: Path, fitted: models.Runs, folder: Path, options: argparse.Namespace) -> Path | None:
    """The candidate's file; None, and the reason said, where it is not made."""
    if way == "static":
        models.static(_raised(path), fitted, fitted[:1], [], folder, options.threads)
        return (folder / "static.onnx").replace(folder / f"{name}.static.onnx")
    calib, out = folder / f"{name}.calib.npz", folder / f"{name}.{options.target}.{way}.onnx"
    models.save(calib, fitted)
    globs = DETECTORS[name].heads
    extra = {"default": [], "none": ["--passes", ""]}.get(way)
    if extra is None:
        extra = [word for glob in globs for word in (WAYS[way], glob)]
    common = ["--calib", str(calib), "-o", str(out), "--threads", str(options.threads), "--target", options.target]
    done = models.tool(str(path), *common, *extra)
    if done.returncode:
        print(f"{name} {way}: {models.last_words(done)}", file=sys.stderr)
    return None if done.returncode else out


def measure(name: str, options: argparse.Namespace, found: dict[str, Any], keep: Callable[[], None]) -> None:
    """Add the rows of a model that are missing."""
    ways = [w for w in WAYS if (w != "static" or options.target == "ort") and f"{name}.{options.target}.{w}" not in found]
    if not ways:
        return
    folder, detector = options.work, DETECTORS[name]
    path, fitted, held = source(name, folder, options)
    wanted = models.outputs(models.opened(path, False, options.threads), held)
    boxes = [detector.decode(y, detector.least) for y in wanted]
    for way in ways:
        file = made(name, way, path, fitted, folder, options)
        if file is None:
            continue
        got = models.outputs(models.opened(file, False, options.threads), held)
        figures = compared(boxes, [detector.decode(y, detector.least) for y in got])
        found[f"{name}.{options.target}.{way}"] = {**figures, "db": models.worst_db(wanted, got), "images": len(held)}
        keep()


def table(found: dict[str, Any]) -> Table:
    """One row a candidate."""
    made = Table(title="Detections")
    for title in ("model", "target", "way", "objects", "found", "tight", "score", "overlap", "dB", "best"):
        made.add_column(title)
    for key, r in found.items():
        name, target, way = key.split(".")
        others = [r2["found"] for k, r2 in found.items() if k.startswith(f"{name}.{target}.")]
        best = ("yes" if r["found"] >= max(others) - _TIE else "NO") if way == "default" else ""
        figures = [f"{r[k]:.3f}" for k in ("found", "tight", "score", "overlap")]
        made.add_row(name, target, way, str(r["objects"]), *figures, f"{r['db']:.1f}", best)
    return made


def main() -> None:
    """Measure and print."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("work", type=Path)
    p.add_argument("--cache", type=Path, required=True, help="folder of wheels (bench_models.py --download)")
    p.add_argument("--pictures", type=Path)
    p.add_argument("--target", default="ort")
    p.add_argument("--model", action="append", choices=DETECTORS)
    p.add_argument("--samples", type=int, default=32)
    p.add_argument("--images", type=int, help="default: by the model")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--again", action="append", default=[], metavar="GLOB", help="NAME.TARGET.WAY, measured anew")
    p.add_argument("--out", type=Path, help="default: WORK/detections.json")
    options = p.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    out: Path = options.out or options.work / "detections.json"
    found: dict[str, Any] = json.loads(out.read_text())["rows"] if out.is_file() else {}
    found = {k: r for k, r in found.items() if not any(fnmatch.fnmatch(k, a) for a in options.again)}
    for name in options.model or DETECTORS:
        measure(name, options, found, lambda: save(out, found))
    Console(width=140).print(table(found))


def save(out: Path, found: dict[str, Any]) -> None:
    """All rows."""
    out.write_text(json.dumps({"schema_version": models.SCHEMA_VERSION, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
