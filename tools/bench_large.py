"""Calibrate and quantize a transformer of several GB to w8a8, and measure the memory that it takes (docs quote the output).

    python tools/bench_large.py [--size 7GB] [--layers 24] [--target trt] [--mem-limit 4GiB] [--json]

The model (random float32 weights in an external file) is written to a temporary folder (TMPDIR), where its weights and
the scratch files of the run, about as large again, have to fit.  `qcompile` runs in a process of its own, as on the
command line.  `anonymous` is the peak of its resident memory apart from pages mapped from files (RssAnon of
/proc/PID/status, read every 20 ms: Linux only).  `blocks` are the SQNR of the residual stream after each layer, the float
model against the quantized one on the calibration samples.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

WORDS = 1024
HEAD = 64
PART_BYTES = 1 << 26
GB = 10**9
UNITS = {"MB": 10**6, "GB": GB, "MiB": 2**20, "GiB": 2**30}

# the model ----------------------------------------------------------------------------------------


@dataclass
class Writer:
    """Nodes, and weights streamed to a file as they are made."""

    path: Path
    nodes: list[onnx.NodeProto] = field(default_factory=list[onnx.NodeProto])
    weights: list[TensorProto] = field(default_factory=list[TensorProto])
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        """Append a node; its output has its name."""
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """Append an initializer."""
        with self.path.open("ab") as f:
            where = {"location": self.path.name, "offset": str(f.tell()), "length": str(array.nbytes)}
            f.write(array.data)
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        for key, value in where.items():
            tensor.external_data.add(key=key, value=value)
        self.weights.append(tensor)
        return name

    def matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> str:
        """Uniform with variance gain^2 / rows."""
        array = self.rng.random((rows, columns), dtype=np.float32)
        array -= np.float32(0.5)
        array *= np.float32(gain * np.sqrt(12 / rows))
        return self.weight(name, array)

    def vector(self, name: str, size: int, mean: float = 0.0) -> str:
        """Normal around `mean`."""
        return self.weight(name, (mean + 0.1 * self.rng.standard_normal(size)).astype(np.float32))

    def linear(self, x: str, name: str, rows: int, columns: int, gain: float = 1.0) -> str:
        """MatMul and Add of a bias."""
        product = self.node("MatMul", [x, self.matrix(f"{name}.weight", rows, columns, gain)], f"{name}_matmul")
        return self.node("Add", [product, self.vector(f"{name}.bias", columns)], name)

    def norm(self, x: str, name: str, width: int) -> str:
        """LayerNormalization."""
        parts = [self.vector(f"{name}.weight", width, 1.0), self.vector(f"{name}.bias", width)]
        return self.node("LayerNormalization", [x, *parts], name, axis=-1)


def write_transformer(path: Path, layers: int, width: int) -> Path:
    """A pre-norm encoder over int64 ids [N, T]: `layers` of attention and a GELU MLP of 4 x `width`, opset 20."""
    w = Writer(path.with_suffix(".data"))
    w.weight("split", np.array([0, 0, width // HEAD, HEAD], np.int64))
    w.weight("join", np.array([0, 0, width], np.int64))
    w.weight("root", np.array(HEAD**-0.5, np.float32))
    x = w.node("Gather", [w.matrix("words", WORDS, width, np.sqrt(WORDS)), "ids"], "embedding")
    for i in range(layers):
        x = _layer(w, x, f"layer{i}", width, gain=1 / np.sqrt(2 * layers))
    w.linear(w.norm(x, "final", width), "logits", width, WORDS)
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", "T"])
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", "T", WORDS])
    graph = helper.make_graph(w.nodes, "transformer", [ids], [out], w.weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def _layer(w: Writer, x: str, name: str, width: int, gain: float) -> str:
    h = w.norm(x, f"{name}.norm1", width)
    q, k, v = (_heads(w, w.linear(h, f"{name}.{part}", width, width), [0, 2, 1, 3]) for part in "qkv")
    k = w.node("Transpose", [k], f"{name}.kt", perm=[0, 1, 3, 2])
    scaled = w.node("Mul", [q, "root"], f"{name}.scaled")
    scores = w.node("Softmax", [w.node("MatMul", [scaled, k], f"{name}.scores")], f"{name}.probabilities", axis=-1)
    context = w.node("Transpose", [w.node("MatMul", [scores, v], f"{name}.context")], f"{name}.back", perm=[0, 2, 1, 3])
    joined = w.node("Reshape", [context, "join"], f"{name}.joined")
    x = w.node("Add", [x, w.linear(joined, f"{name}.out", width, width, gain)], f"{name}.residual1")
    h = w.linear(w.norm(x, f"{name}.norm2", width), f"{name}.fc1", width, 4 * width)
    return w.node(
        "Add", [x, w.linear(w.node("Gelu", [h], f"{name}.gelu"), f"{name}.fc2", 4 * width, width, gain)], f"{name}.residual2"
    )


def _heads(w: Writer, x: str, perm: list[int]) -> str:
    return w.node("Transpose", [w.node("Reshape", [x, "split"], f"{x}_split")], f"{x}_heads", perm=perm)


def width_for(size: float, layers: int) -> int:
    """The multiple of the head size whose 12 width^2 weights a layer come nearest to `size` bytes."""
    return HEAD * max(1, round((size / (4 * 12 * layers)) ** 0.5 / HEAD))


# the run ------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A finished command."""

    seconds: float
    anonymous: int
    output: str


def measured(command: list[str]) -> Run:
    """Run a command and watch its memory."""
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.02)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{err.read()}")
        return Run(time.perf_counter() - start, peak, out.read())


def anonymous(pid: int | str) -> int:
    """Resident bytes that are not mapped from files; 0 when the process is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def bench(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Generate, quantize, compare."""
    width = width_for(args.size, args.layers)
    model = write_transformer(folder / "model.onnx", args.layers, width)
    rng, data, quantized = np.random.default_rng(1), folder / "data.npz", folder / "quantized.onnx"
    np.savez(data, ids=rng.integers(0, WORDS, (args.samples, args.tokens)))
    weights = (folder / "model.data").stat().st_size
    tool = [sys.executable, "-m", "qcompile"]
    limit = ["--mem-limit", args.mem_limit] if args.mem_limit else []
    limit += ["--passes", args.passes] if args.passes is not None else []
    options = ["--target", args.target, "--scheme", "w8a8", "--verify", args.verify, *limit]
    made = measured([*tool, str(model), "--calib", str(data), "-o", str(quantized), *options])
    result = {
        "weights_gb": weights / GB, "layers": args.layers, "width": width, "samples": args.samples, "tokens": args.tokens,
        "quantized_gb": sum(f.stat().st_size for f in folder.glob("quantized*")) / GB, **_memory(made, weights),
    }  # fmt: skip
    checked = measured([sys.executable, __file__, "--compare", str(model), str(quantized), str(data)])
    *blocks, logits = json.loads(checked.output)
    return {**result, "check": _memory(checked, weights), "sqnr_db": logits, "blocks": blocks}


def compare(reference: str, candidate: str, data: str) -> list[float]:
    """SQNR in dB of the residual stream after each layer and of the logits, on the data as one batch."""
    from qcompile.execute.metrics import Distance
    from qcompile.execute.opening import run_in_parts
    from qcompile.ir.model import Model

    feeds, found = [dict(np.load(data))], list[list[NDArray[Any]]]()
    for path in (reference, candidate):
        model = Model.load(path)
        made = {str(v.name): v for node in model.graph for v in node.outputs}
        names = [name for name in made if name.endswith(".residual2")]
        model.graph.outputs[:0] = [made[name] for name in sorted(names, key=lambda n: int(re.findall(r"\d+", n)[0]))]
        found += run_in_parts(model, feeds, PART_BYTES)
    errors = [Distance() for _ in found[0]]
    for error, r, c in zip(errors, *found, strict=True):
        error.add(r, c)
    return [error.sqnr_db for error in errors]


def _memory(run: Run, weights: int) -> dict[str, float]:
    return {"seconds": run.seconds, "anonymous_gb": run.anonymous / GB, "share_of_weights": run.anonymous / weights}


# the command line ---------------------------------------------------------------------------------


def size(text: str) -> float:
    """7GB, 300MB, 4GiB."""
    found = re.fullmatch(r"([\d.]+)\s*([MG]i?B)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 7GB")
    return float(found[1]) * UNITS[found[2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=size, default=size("7GB"))
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--target", default="trt")
    parser.add_argument("--verify", default="each")
    parser.add_argument("--mem-limit")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--passes", help="default: the target's")
    parser.add_argument("--compare", nargs=3, metavar=("MODEL", "QUANTIZED", "DATA"), help="only the comparison, as JSON")
    args = parser.parse_args()
    if args.compare:
        print(json.dumps(compare(*args.compare)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = bench(Path(folder), args)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(f"{result['weights_gb']:.2f} GB of weights, {args.layers} layers of width {result['width']}, {args.target} w8a8")
    for name, run in (("quantize", result), ("compare", result["check"])):
        memory = f"{run['anonymous_gb']:.2f} GB, {run['share_of_weights']:.1%} of the weights"
        print(f"{name}: {run['seconds']:.0f} s, anonymous memory {memory}")
    print(f"output {result['quantized_gb']:.2f} GB, SQNR {result['sqnr_db']:.1f} dB; after each layer: ", end="")
    print(" ".join(f"{b:.1f}" for b in result["blocks"]))


if __name__ == "__main__":
    main()
