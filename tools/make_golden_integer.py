"""Make models/digits_cnn.integer.onnx and the integers that every host must compute with it.

    python tools/make_golden_integer.py

`digits_cnn.integer.expected.npz`: `input` (16 evaluation pictures), `codes` (what QuantizeLinear makes of them) and `result`
(the integers before the last DequantizeLinear), computed by the oracle.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

import qcompile
from qcompile.oracle.graph import integer_graph
from qcompile.oracle.run import encode, run_integer

MODELS = Path(__file__).parents[1] / "models"
SAMPLES = 16


def main() -> None:
    """Compile, run the oracle, save."""
    target = MODELS / "digits_cnn.integer.onnx"
    qcompile.compile(MODELS / "digits_cnn.onnx", output=target, target="integer", threads=1)
    graph = integer_graph(onnx.load(target))
    pictures = np.load(MODELS / "digits_cnn.eval.npz")["input"][:SAMPLES]
    codes = encode(graph, {"input": pictures})
    (result,) = run_integer(graph, codes).values()
    np.savez_compressed(MODELS / "digits_cnn.integer.expected.npz", input=pictures, codes=codes[graph.sources[0]], result=result)
    print(f"{target.name}: {target.stat().st_size} bytes, {result.size} expected integers, {result.dtype}")


if __name__ == "__main__":
    main()
