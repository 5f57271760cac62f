"""Run by test_memory.py in a process of its own: how much a sweep makes this process grow, and what was predicted.

python -m tests.calib.sweep.sweep_memory OBSERVER BATCH LIMIT SAMPLES        (LIMIT 0: none)
"""

from __future__ import annotations

import json
import resource
import sys

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from qcompile.calib.data.dataset import Dataset
from qcompile.calib.data.readers import ArrayReader
from qcompile.calib.observe import Observer, Probe
from qcompile.calib.sweep.memory import plan_memory
from qcompile.calib.sweep.sweep import sweep
from qcompile.execute.session import providers
from qcompile.ir.model import Model

DIM, TOKENS, LAYERS = 256, 128, 6


def mlp() -> tuple[Model, list[str]]:
    """Residual blocks of two linear layers, and the linears' inputs."""
    rng, node = np.random.default_rng(0), helper.make_node
    nodes, weights, tensors, x = [], [], [], "x"
    for i in range(LAYERS):
        for name, shape in ((f"u{i}", (DIM, 4 * DIM)), (f"d{i}", (4 * DIM, DIM))):
            weights.append(numpy_helper.from_array((rng.standard_normal(shape) / 30).astype(np.float32), name))
        nodes += [node("MatMul", [x, f"u{i}"], [f"a{i}"], name=f"a{i}"), node("Relu", [f"a{i}"], [f"r{i}"], name=f"r{i}")]
        nodes += [node("MatMul", [f"r{i}", f"d{i}"], [f"y{i}"], name=f"y{i}"), node("Add", [x, f"y{i}"], [f"z{i}"], name=f"z{i}")]
        tensors, x = [*tensors, x, f"r{i}"], f"z{i}"
    inputs = [helper.make_tensor_value_info("x", T.FLOAT, ["N", TOKENS, DIM])]
    graph = helper.make_graph(nodes, "mlp", inputs, [helper.make_tensor_value_info(x, T.FLOAT, None)], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Model.from_proto(onnx.shape_inference.infer_shapes(proto)), tensors


def main(kind: str, batch: int, limit: int | None, samples: int) -> None:
    model, tensors = mlp()
    one = np.random.default_rng(0).standard_normal((1, TOKENS, DIM), np.float32)
    x = np.broadcast_to(one, (samples, TOKENS, DIM))
    data = Dataset(ArrayReader({"x": x}, {"x": x.dtype}, {}), tuple(range(samples)), ("x",), "memory")
    probes = [Probe(t, Observer.kinds[kind]()) for t in tensors]
    planned = plan_memory(model, data, probes, batch, limit)
    providers()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sweep(model, data, probes, batch=batch, threads=1, mem_limit=limit)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(
        json.dumps({"predicted": planned.predicted_bytes, "grown": grown, "peak": before + grown, "sweeps": len(planned.sweeps)})
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) or None, int(sys.argv[4]))
