"""Which pairs of 8-bit types ONNX Runtime multiplies exactly on this host, at the extremes of both types.

    python tools/probe_int8.py
    qemu-x86_64 -cpu Haswell python tools/probe_int8.py        AVX2 without VNNI (Debian's qemu-user, 7.2 or newer)

Prints one row a pair and operator (the table of docs/guide/integer.md), at full optimization and with optimizations off.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, helper, numpy_helper

from qcompile.errors import ModelError
from qcompile.execute.session import make_session

K, SIDE = 64, 9
PAIRS = ((np.int8, np.int8), (np.uint8, np.int8), (np.int8, np.uint8), (np.uint8, np.uint8))
OPERATORS = ("MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv")


def extreme(dtype: type, *shape: int, least: bool) -> np.ndarray:
    """An array of the type's largest magnitude: -128 or 127, or 255."""
    info = np.iinfo(dtype)
    return np.full(shape, info.min if least and info.min else info.max, dtype)


def case(op: str, first: type, second: type) -> tuple[ModelProto, np.ndarray, int]:
    """(model, its input, the element that every output must be)."""
    a = extreme(first, *((1, K, SIDE, SIDE) if "Conv" in op else (SIDE, K)), least=True)
    b = extreme(second, *((K, K, 1, 1) if "Conv" in op else (K, K)), least=False)
    total, names, stored = K * int(a.flat[0]) * int(b.flat[0]), ["a", "b"], {"b": b}
    if op.startswith("QLinear"):
        names = ["a", "one", "az", "b", "one", "bz", "scale", "az"]
        stored |= {
            "one": np.float32(1),
            "az": np.zeros((), first),
            "bz": np.zeros((), second),
            "scale": np.float32(abs(total) / 100),
        }
        total = 100 if total > 0 else -100
    dtype = first if op.startswith("QLinear") else np.int32
    ends = [helper.make_tensor_value_info("a", helper.np_dtype_to_tensor_dtype(np.dtype(first)), a.shape)]
    ends.append(helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), None))
    constants = [numpy_helper.from_array(np.asarray(v), name) for name, v in stored.items()]
    graph = helper.make_graph([helper.make_node(op, names, ["y"])], "g", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), a, total


def verdict(op: str, first: type, second: type, optimize: str) -> str:
    """exact, saturates, or no kernel."""
    model, a, expected = case(op, first, second)
    try:
        session = make_session(model.SerializeToString(), optimize=optimize, threads=1, use=["CPUExecutionProvider"])  # type: ignore[arg-type]
    except ModelError:
        return "no kernel"
    return "exact" if np.all(np.asarray(session.run(None, {"a": a})[0]) == expected) else "saturates"


def main() -> None:
    """Print the table."""
    for first, second in PAIRS:
        found = {op: [verdict(op, first, second, level) for level in ("off", "all")] for op in OPERATORS}
        print(f"{first.__name__:>5} by {second.__name__:<5}", *(f"{op}: {'/'.join(dict.fromkeys(v))}" for op, v in found.items()))


if __name__ == "__main__":
    main()
