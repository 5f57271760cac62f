"""Softmax and GELU codes: metric and SQNR of each kind at 4 and 3 bits, everything else at w8a8, on the same samples.

python tools/bench_companding.py                                             vit_digits and char_gpt of models/
python tools/bench_companding.py --models DIR --calib DIR --model hybrid_vit_cifar10 --outliers
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qcompile.calib.data import load_data  # noqa: E402
from qcompile.calib.sweep.provider import Sweeps  # noqa: E402
from qcompile.execute.metrics import sqnr_db  # noqa: E402
from qcompile.execute.session import make_session  # noqa: E402
from qcompile.ir.model import Model  # noqa: E402
from qcompile.pipeline import registry  # noqa: E402
from qcompile.pipeline.base import PassContext  # noqa: E402
from qcompile.pipeline.planner import complete  # noqa: E402
from qcompile.pipeline.runner import Runner, drive  # noqa: E402
from qcompile.quant.spec import SCHEMES  # noqa: E402
from qcompile.target.catalog import TARGETS  # noqa: E402
from tools.transplant import transplant  # noqa: E402

SOFTMAX = ("uniform", "log2", "log-sqrt2", "sulq", "adalog", "tan", "twin")
PUBLISHED = ("log2", "log-sqrt2", "sulq", "adalog", "twin")
GELU = ("adalog", "twin")
FRONT = "repq"


def pipelines(bits: tuple[int, ...]) -> dict[str, str]:
    """Name of a row -> pipeline."""
    made = {"8 bit, softmax float": FRONT}
    for b in bits:
        made |= {f"{k} {b}": f"{FRONT},log2-softmax{{kind={k} bits={b}}}" for k in SOFTMAX}
        made |= {
            f"{k} {b} paper": f"{FRONT},log2-softmax{{kind={k} bits={b} paper}}" for k in SOFTMAX if k not in ("uniform", "tan")
        }
        made |= {f"gelu {k} {b}": f"{FRONT},compand-gelu{{kind={k} bits={b}}}" for k in GELU}
    return made


def run(model: Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The first output, optimizations off."""
    session = make_session(model.to_proto().SerializeToString(), optimize="off", qdq_fusion=False, threads=1)
    count = len(next(iter(feeds.values())))
    parts = [session.run(None, {k: v[i : i + 16] for k, v in feeds.items()})[0] for i in range(0, count, 16)]
    return np.concatenate([np.asarray(p) for p in parts])


def table(name: str, options: argparse.Namespace) -> None:
    """All pipelines on one model."""
    source = Model.load(options.models / f"{name}.onnx")
    if options.outliers:
        source = transplant(source)
    folder = options.calib or options.models
    suffix = ".calib" if (folder / f"{name}.calib.npz").is_file() else ""
    data = load_data(str(folder / f"{name}{suffix}.npz"), source.inputs(), samples=options.samples)
    inputs = [v.name for v in source.inputs()]
    with np.load(options.eval or folder / f"{name}.eval.npz") as z:
        feeds = {k: z[k][: options.evaluated] for k in inputs}
        labels = z["labels"][: options.evaluated] if "labels" in z else None
    reference = run(source, feeds)
    print(f"\n{name}{' (outliers)' if options.outliers else ''}: float {metric(reference, labels, reference)}")
    sweeps = Sweeps(data, threads=1)
    for row, text in pipelines(tuple(options.bits)).items():
        ctx = PassContext(SCHEMES["w8a8"], TARGETS["ort"])
        plan = complete(registry.parse(text), ctx.target, ctx.scheme)
        made, _ = drive(Runner(verify="off").steps(source, plan.passes, ctx), lambda n: sweeps.collect(n.model, n.probes))
        got = run(made, feeds)
        print(f"| {row} | {sqnr_db(reference, got):.1f} | {metric(got, labels, reference)} |", flush=True)


def metric(got: np.ndarray, labels: np.ndarray | None, reference: np.ndarray) -> str:
    """Top-1 with the labels (next-character models: per position), and agreement with the float model."""
    chosen = got.argmax(-1)
    same = f"agreement {np.mean(chosen == reference.argmax(-1)):.4f}"
    return same if labels is None or labels.shape != chosen.shape else f"top-1 {np.mean(chosen == labels):.4f}, {same}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, default=ROOT / "models")
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--eval", type=Path, help="samples to measure on (default: NAME.eval.npz beside the calibration data)")
    parser.add_argument("--model", action="append")
    parser.add_argument("--bits", type=int, action="append")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--evaluated", type=int, default=200)
    parser.add_argument("--outliers", action="store_true")
    options = parser.parse_args()
    options.bits = options.bits or [4, 3]
    for name in options.model or ("vit_digits", "char_gpt"):
        table(name, options)


if __name__ == "__main__":
    main()
