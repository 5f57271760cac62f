"""What the default command gives on TensorRT: share, coverage and fused attention of every model, audited without a GPU.

python tools/bench_audit.py                                      the models of models/
python tools/bench_audit.py --models DIR --calib DIR [--json]    every M.onnx of one folder, calibrated on M.npz of another

Each model is compiled with default flags for `--target rtx`: w8a8 is audited for sm86 and sm89, fp8 for sm89 and sm120.
`share` is the part of the planned work that runs in kernels reading its type, `coverage` the part of all GEMM,
convolution and attention work; `size` compares the engine with that of the fp16 twin (`--scheme fp16`), built for sm89.
The kernels are those of TensorRT-RTX: a proxy for other versions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from qcompile.backend.audit import AuditResult, audit
from qcompile.backend.tensorrt import build_engine
from qcompile.verbs.compile.run import compile

ROOT = Path(__file__).resolve().parents[1]
SCHEMA_VERSION = 1
MATRIX = {"w8a8": ("sm86", "sm89"), "fp8": ("sm89", "sm120")}
SIZED_FOR = "sm89"


@dataclass(frozen=True)
class Row:
    """One audited model; figures as `qcompile audit` defines them, `size` = engine bytes over those of the fp16 twin."""

    model: str
    scheme: str
    gpu: str
    share: float | None
    coverage: float | None
    attention_blocks: int
    attention_fused_blocks: int
    float_nodes: tuple[str, ...]
    wasted_pairs: tuple[str, ...]
    size: float | None


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="folder of float models")
    parser.add_argument("--calib", type=Path, help="folder of MODEL.npz; default: MODEL.calib.npz beside the model")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a model's name without .onnx; repeatable")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-sizes", action="store_true", help="build no engines of fp16 twins")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args()
    rows: list[Row] = []
    for model, data in _models(args.models, args.calib, args.only):
        for row in _rows(model, data, args.threads, not args.no_sizes):
            rows.append(row)
            print(_line(row), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(json.dumps({"schema_version": SCHEMA_VERSION, "rows": [asdict(r) for r in rows]}, indent=2))


def _models(folder: Path, calib: Path | None, only: list[str]) -> Iterator[tuple[Path, Path]]:
    for model in sorted(folder.glob("*.onnx")):
        data = model.with_suffix(".calib.npz") if calib is None else calib / f"{model.stem}.npz"
        if only and model.stem not in only:
            continue
        if data.is_file():
            yield model, data
        else:
            print(f"{model.name}: left out, there is no {data.name}", file=sys.stderr)


def _rows(model: Path, data: Path, threads: int, sizes: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        twin = _engine_size(_compiled(model, data, "fp16", threads, folder), folder) if sizes else None
        for scheme, gpus in MATRIX.items():
            made = _compiled(model, data, scheme, threads, folder)
            size = _engine_size(made, folder) / twin if twin is not None else None
            for gpu in gpus:
                yield _row(model.stem, scheme, audit(made, gpu), size)


def _compiled(model: Path, data: Path, scheme: str, threads: int, folder: Path) -> Path:
    out = folder / f"{model.stem}.{scheme}.onnx"
    return compile(model, target="rtx", scheme=scheme, calib=str(data), threads=threads, verify="off", output=out).output


def _engine_size(model: Path, folder: Path) -> int:
    return build_engine(model, folder / f"{model.stem}.engine", target="rtx", gpus=[SIZED_FOR]).size


def _row(name: str, scheme: str, result: AuditResult, size: float | None) -> Row:
    doc = result.to_json()
    blocks, fused = result.attention
    nodes, wasted = (tuple(x["node"] for x in doc[key]) for key in ("float_nodes", "wasted_pairs"))
    return Row(name, scheme, result.gpu, result.share, result.coverage, blocks, fused, nodes, wasted, size)


def _line(r: Row) -> str:
    fused = f"{r.attention_fused_blocks}/{r.attention_blocks}" if r.attention_blocks else "-"
    size = "-" if r.size is None else f"{r.size:.2f}"
    floats = f"{', '.join(r.float_nodes[:4])}{' ...' if len(r.float_nodes) > 4 else ''}"
    figures = f"{_figure(r.share)} {_figure(r.coverage)} {fused:>6} {size:>5}"
    return f"{r.model:26} {r.scheme:5} {r.gpu:6} {figures}  {len(r.float_nodes)} in float: {floats}"


def _figure(value: float | None) -> str:
    return "    -" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
