"""Give a trained transformer the activation outliers that large ones have, without changing its function.

usage: transplant.py IN.onnx OUT.onnx [--sigma 0.35] [--share 0.02] [--low 12] [--high 33] [--seed 0]

The affine fold of SmoothQuant and RepQ, run backwards: each norm's gamma and beta are multiplied by a spread r, the rows of
the linear layers behind it divided by it.  r is log-normal; a share of the channels is 12 to 33 times as large (DeiT-S shows
0.8 to 26.5, RepQ-ViT, arXiv:2212.08254, figure 2).  Naive per-tensor quantization of the result collapses.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qcompile.calib.observe.change import Changes
from qcompile.ir.model import Model
from qcompile.passes.forms.canonicalize.canonicalize import Canonicalize
from qcompile.pipeline.base import PassContext
from qcompile.quant.spec import SCHEMES
from qcompile.report import Remarks
from qcompile.rewrite.fold import fold, norm_sites
from qcompile.target.catalog import TARGETS


def spread(
    channels: int, rng: np.random.Generator, sigma: float = 0.35, share: float = 0.02, low: float = 12.0, high: float = 33.0
) -> NDArray[np.float64]:
    """r [channels]: log-normal, and at least one channel (a `share` of them) `low` to `high` times as large."""
    r = rng.lognormal(0.0, sigma, channels)
    chosen = rng.choice(channels, max(1, round(share * channels)), replace=False)
    r[chosen] *= rng.uniform(low, high, len(chosen))
    return r


def transplant(
    model: Model, seed: int = 0, sigma: float = 0.35, share: float = 0.02, low: float = 12.0, high: float = 33.0
) -> Model:
    """A copy of `model` whose norms put out channels of very different ranges; the float function stays."""
    copy, rng = model.clone(), np.random.default_rng(seed)
    ctx = PassContext(SCHEMES["w8a8"], TARGETS["trt"], remarks=Remarks("transplant"))
    Canonicalize().apply(copy, ctx)
    for site in norm_sites(copy.graph):
        r = spread(site.weight_rows().shape[0], rng, sigma, share, low, high)
        fold(copy.graph, site, 1 / r, np.zeros_like(r), Changes())
    return copy


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    for name, value in {"sigma": 0.35, "share": 0.02, "low": 12.0, "high": 33.0}.items():
        parser.add_argument(f"--{name}", type=float, default=value)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    made = transplant(Model.load(args.model), args.seed, args.sigma, args.share, args.low, args.high)
    print(made.save(args.output))


if __name__ == "__main__":
    main()
