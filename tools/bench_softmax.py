"""Why few-bit uniform attention probabilities do or do not collapse: where the mass lies, and what quantizing nothing else costs.

python tools/bench_softmax.py                                              vit_digits and char_gpt of models/
python tools/bench_softmax.py --models DIR --calib DIR --model hybrid_vit_cifar10 --bits 4 --bits 3 [--json]

A row of probabilities has an entropy (here over log n: 1 is uniform attention) and a share of mass in values that uniform codes
of [0, 1] round to zero (below half a step).  Uniform codes collapse where that share is large; power-of-two codes have no such
threshold above 2^-15.  Everything but the softmax outputs stays float, so the transplant of `tools/transplant.py`, which leaves
the float function as it is, changes no figure here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qcompile.calib.data import Dataset, fixed_batch, load_data  # noqa: E402
from qcompile.execute.metrics import Distance, LogitTally  # noqa: E402
from qcompile.execute.session import make_session, run_batches  # noqa: E402
from qcompile.ir.edit import add_constant, insert_after, new_node, redirect  # noqa: E402
from qcompile.ir.model import Model  # noqa: E402

Array = NDArray[Any]
CODES = ("uniform [0, 1]", "uniform [0, max]", "log2", "log-sqrt2")
_TINY = 1e-30


def probabilities(model: Model) -> list[ir.Value]:
    """Outputs of all Softmax nodes over a last axis (of heads: attention)."""
    return [n.outputs[0] for n in model.graph if n.op_type == "Softmax" and n.outputs[0] not in model.graph.outputs]


def coded(source: Model, codes: str, bits: int, tops: dict[str, float]) -> Model:
    """A copy whose attention probabilities go through 2^bits codes; all else is float."""
    made = source.clone()
    for value in probabilities(made):
        uses = list(value.uses())
        chain = _uniform if codes.startswith("uniform") else _logarithmic
        last = chain(made.graph, value, codes, bits, tops[str(value.name)])
        redirect(value, last, uses)
    return made


def _uniform(graph: ir.Graph, value: ir.Value, codes: str, bits: int, top: float) -> ir.Value:
    step = (1.0 if codes == "uniform [0, 1]" else top) / (2**bits - 1)
    return _chain(graph, value, [("Div", step), ("Round", None), ("Min", 2.0**bits - 1), ("Mul", step)])


def _logarithmic(graph: ir.Graph, value: ir.Value, codes: str, bits: int, top: float) -> ir.Value:
    """2^(-q / k), q = round(-k log2 p); the last code is zero."""
    k = (1.0 if codes == "log2" else 2.0) / np.log(2.0)
    lowest = 2.0**bits - 1
    exponent = [("Max", _TINY), ("Log", None), ("Mul", -k), ("Round", None), ("Min", lowest)]
    code = _chain(graph, value, exponent)
    kept = _chain(graph, code, [("Sub", lowest), ("Neg", None), ("Min", 1.0)])
    power = _chain(graph, code, [("Mul", -1.0 / k), ("Exp", None)])
    product = new_node(graph, "Mul", [power, kept], name=f"{value.name}_kept", like=value)
    insert_after(graph, kept, product)
    return product.outputs[0]


def _chain(graph: ir.Graph, value: ir.Value, steps: Sequence[tuple[str, float | None]]) -> ir.Value:
    """Elementwise steps behind `value`, each with its constant."""
    for op, number in steps:
        name = f"{value.name}_{op.lower()}"
        second = [] if number is None else [add_constant(graph, f"{name}_by", np.asarray(number, np.float32))]
        node = new_node(graph, op, [value, *second], name=name, like=value)
        insert_after(graph, value, node)
        value = node.outputs[0]
    return value


def run(model: Model, data: Dataset) -> list[list[Array]]:
    """All outputs of every batch."""
    session = make_session(model.to_proto().SerializeToString(), threads=1)
    return list(run_batches(session, data, fixed_batch(model.inputs()) or 8))


def spread(source: Model, data: Dataset, bits: list[int]) -> tuple[dict[str, Any], dict[str, float]]:
    """Mean entropy over log n, mean largest probability and the shares of mass lost to zero; each softmax's largest value."""
    exposed = source.clone()
    values = probabilities(exposed)
    exposed.graph.outputs.clear()
    exposed.graph.outputs.extend(values)
    names, sums, tops = [str(v.name) for v in values], dict[str, float](), dict[str, float]()
    rows = 0
    for batch in run(exposed, data):
        for name, p in zip(names, batch, strict=True):
            tops[name] = max(tops.get(name, 0.0), float(p.max()))
            rows += p[..., 0].size
            for key, value in _of_rows(p.reshape(-1, p.shape[-1]).astype(np.float64), bits).items():
                sums[key] = sums.get(key, 0.0) + value
    return {key: value / rows for key, value in sums.items()}, tops


def _of_rows(p: NDArray[np.float64], bits: list[int]) -> dict[str, float]:
    """Sums over rows [R, n]."""
    alive = (p > 1e-9).sum(-1)
    entropy = -(p * np.log(np.maximum(p, _TINY))).sum(-1) / np.log(np.maximum(alive, 2))
    lost = {f"lost at {b} bits": float((p * (p < 0.5 / (2**b - 1))).sum()) for b in bits}
    return {"entropy": float(entropy.sum()), "largest": float(p.max(-1).sum()), **lost}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model: where its mass lies, and SQNR and agreement of each code."""
    source = Model.load(options.models / f"{name}.onnx")
    path = (options.calib or options.models) / f"{name}.eval.npz"
    data = load_data(str(path), source.inputs(), samples=options.samples)
    found, tops = spread(source, data, options.bits)
    reference = run(source, data)
    codes = {
        f"{kind}, {b} bits": _distance(reference, run(coded(source, kind, b, tops), data)) for b in options.bits for kind in CODES
    }
    return {"softmaxes": len(tops), "spread": found, "codes": codes, "samples": len(data)}


def _distance(reference: list[list[Array]], candidate: list[list[Array]]) -> dict[str, float]:
    distance, logits = Distance(), LogitTally()
    for r, c in zip(reference, candidate, strict=True):
        distance.add(r[0], c[0])
        logits.add(r[0], c[0])
    return {"sqnr_db": distance.sqnr_db, "agreement": logits.agreement}


def tables(found: dict[str, dict[str, Any]]) -> list[Table]:
    """Where the mass lies, and what the codes cost."""
    keys = list(next(iter(found.values()))["spread"])
    first = Table("model", "softmaxes", *keys, box=None)
    second = Table("model", "codes of the probabilities, all else float", "SQNR, dB", "agreement", box=None)
    for name, cell in found.items():
        first.add_row(name, str(cell["softmaxes"]), *(f"{cell['spread'][k]:.3f}" for k in keys))
        for codes, d in cell["codes"].items():
            second.add_row(name, codes, f"{d['sqnr_db']:.2f}", f"{d['agreement']:.4f}")
    return [first, second]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=ROOT / "models")
    parser.add_argument("--calib", type=Path, help="folder of NAME.eval.npz")
    parser.add_argument("--model", action="append")
    parser.add_argument("--bits", type=int, action="append")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.bits = options.bits or [4, 3]
    found = {name: measure(name, options) for name in options.model or ("vit_digits", "char_gpt")}
    if options.json:
        print(json.dumps({"schema_version": 1, "models": found}, indent=2))
    else:
        for table in tables(found):
            Console(width=140).print(table)


if __name__ == "__main__":
    main()
