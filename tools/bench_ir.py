"""Compare onnx-ir and onnx-graphsurgeon as the graph that passes work on (docs/adr/001-onnx-ir.md quotes the output).

    python tools/bench_ir.py [--size 400MB] [--uses 2000] [--json]

Each figure comes from a process of its own, so that a peak is that library's alone.  Peak memory is the process's
high-water mark minus what importing the library takes; `anonymous` leaves out pages mapped from the weights file.
`bridge` is graphsurgeon behind qcompile's to_gs and from_gs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MB = 1e6
WIDTH = 2048
LIBRARIES = ("onnx-ir", "graphsurgeon", "bridge")
MODULES = {"onnx-ir": "onnx_ir", "graphsurgeon": "onnx_graphsurgeon", "bridge": "qcompile.ir.surgeon"}

# the models ---------------------------------------------------------------------------------------


def write_large(path: Path, size: float) -> None:
    """A chain of MatMuls of 2048 x 2048 float32 weights (16.8 MB each) in one external file."""
    count, rng = max(1, round(size / (4 * WIDTH * WIDTH))), np.random.default_rng(0)
    weights = [onnx.TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH]) for i in range(count)]
    with path.with_suffix(".data").open("wb") as f:
        for tensor in weights:
            _place(tensor, path.with_suffix(".data").name, f.tell())
            f.write(rng.standard_normal((WIDTH, WIDTH), dtype=np.float32).tobytes())
    nodes = [helper.make_node("MatMul", [f"t{i}", f"w{i}"], [f"t{i + 1}"], name=f"mm{i}") for i in range(count)]
    _save(path, nodes, weights, f"t{count}", WIDTH)


def _place(tensor: onnx.TensorProto, location: str, offset: int) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(4 * WIDTH * WIDTH))):
        tensor.external_data.add(key=key, value=value)


def write_shared(path: Path, uses: int) -> None:
    """A chain of `uses` Adds that all read one constant; nodes and values carry metadata."""
    nodes = [helper.make_node("Add", [f"t{i}", "c"], [f"t{i + 1}"], name=f"add{i}") for i in range(uses)]
    for node in nodes:
        node.metadata_props.add(key="site", value=node.name)
    _save(path, nodes, [numpy_helper.from_array(np.ones(4, np.float32), "c")], f"t{uses}", 4)


def write_int4(path: Path) -> None:
    """An INT4 weight behind a DequantizeLinear."""
    codes = np.arange(-8, 8).reshape(4, 4)
    weight = helper.make_tensor("w", TensorProto.INT4, [4, 4], codes.ravel().tolist())
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], name="dq"),
        helper.make_node("MatMul", ["t0", "d"], ["t1"], name="mm"),
    ]
    _save(path, nodes, [weight, numpy_helper.from_array(np.array(1, np.float32), "s")], "t1", 4)


def _save(path: Path, nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], output: str, width: int) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", width]) for name in ("t0", output)]
    infos = [helper.make_tensor_value_info(n.output[0], TensorProto.FLOAT, ["N", width]) for n in nodes[:-1]]
    for info in infos:
        info.metadata_props.add(key="unit", value="1")
    graph = helper.make_graph(nodes, "bench", ends[:1], ends[1:], weights, value_info=infos)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    path.write_bytes(model.SerializeToString())


# one measurement a process ------------------------------------------------------------------------


def _status(key: str) -> float:
    """A line of /proc/self/status in bytes."""
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return float(match.group(1)) * 1024 if match else float("nan")


def memory(library: str, path: Path, _: int) -> dict[str, Any]:
    """Load a model, change one weight, save it."""
    base, anonymous = _status("VmRSS"), _status("RssAnon")
    start = time.perf_counter()
    held = {"onnx-ir": _change_onnx_ir, "graphsurgeon": _change_graphsurgeon, "bridge": _change_bridge}[library](path)
    seconds, anonymous = time.perf_counter() - start, _status("RssAnon") - anonymous
    del held
    return {"peak_mb": (_status("VmHWM") - base) / MB, "anonymous_mb": anonymous / MB, "seconds": seconds}


def _change_onnx_ir(path: Path) -> Any:
    import onnx_ir as ir

    model = ir.load(path)
    value = model.graph.initializers["w0"]
    assert value.const_value is not None
    value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(0.5), name="w0")
    ir.save(model, path.with_name("out.onnx"), external_data="out.data")
    return model


def _change_graphsurgeon(path: Path) -> Any:
    import onnx_graphsurgeon as gs

    graph = gs.import_onnx(onnx.load(path))
    weight = graph.tensors()["w0"]
    weight.values = weight.values * np.float32(0.5)
    onnx.save(gs.export_onnx(graph), path.with_name("out.onnx"), save_as_external_data=True, location="out.data")
    return graph


def _change_bridge(path: Path) -> Any:
    import onnx_ir as ir

    from qcompile.ir.model import Model
    from qcompile.ir.surgeon import from_gs, to_gs

    model = Model.load(path)
    graph = to_gs(model)
    weight = graph.tensors()["w0"]
    weight.values = weight.values * np.float32(0.5)
    back = from_gs(graph, model)
    ir.save(back.ir, path.with_name("out.onnx"), external_data="out.data")
    return back


def rewire(library: str, path: Path, uses: int) -> dict[str, Any]:
    """Let every reader of one constant read another, in the order of the uses and in reverse."""
    move = _rewire_onnx_ir if library == "onnx-ir" else _rewire_graphsurgeon
    return {order: move(path, uses, order == "reversed_s") for order in ("forward_s", "reversed_s")}


def _rewire_onnx_ir(path: Path, uses: int, backwards: bool) -> float:
    import onnx_ir as ir

    model = ir.load(path)
    old, new = model.graph.initializers["c"], ir.Value(name="c2")
    start = time.perf_counter()
    for node, slot in list(old.uses())[:: -1 if backwards else 1]:
        node.replace_input_with(slot, new)
    assert len(new.uses()) == uses
    return time.perf_counter() - start


def _rewire_graphsurgeon(path: Path, uses: int, backwards: bool) -> float:
    import onnx_graphsurgeon as gs

    graph = gs.import_onnx(onnx.load(path))
    old, new = graph.tensors()["c"], gs.Constant("c2", np.zeros(4, np.float32))
    start = time.perf_counter()
    for node in list(old.outputs)[:: -1 if backwards else 1]:
        node.inputs[1] = new
    assert len(new.outputs) == uses
    return time.perf_counter() - start


def metadata(library: str, path: Path, _: int) -> dict[str, Any]:
    """Load and save; count the nodes and values whose metadata is still there."""
    proto = onnx.load(path)
    nodes, values = _count(proto)
    kept = _count(_round_trip(library, proto))
    return {"nodes": nodes, "values": values, "nodes_kept": kept[0], "values_kept": kept[1]}


def _count(proto: onnx.ModelProto) -> tuple[int, int]:
    return sum(bool(n.metadata_props) for n in proto.graph.node), sum(bool(v.metadata_props) for v in proto.graph.value_info)


def _round_trip(library: str, proto: onnx.ModelProto, touch: str | None = None) -> onnx.ModelProto:
    if library == "onnx-ir":
        import onnx_ir as ir

        model = ir.from_proto(proto)
        if touch is not None:
            value = model.graph.initializers[touch]
            assert value.const_value is not None
            value.const_value = ir.Tensor(np.array(value.const_value.numpy()), name=touch)
        return ir.to_proto(model)
    import onnx_graphsurgeon as gs

    from qcompile.ir.model import Model
    from qcompile.ir.surgeon import from_gs, to_gs

    model = Model.from_proto(proto) if library == "bridge" else None
    graph = gs.import_onnx(proto) if model is None else to_gs(model)
    if touch is not None:
        tensor = graph.tensors()[touch]
        tensor.values = np.array(tensor.values)
    return gs.export_onnx(graph) if model is None else from_gs(graph, model).to_proto()


def int4(library: str, path: Path, _: int) -> dict[str, Any]:
    """Read an INT4 weight, set it to the same values, save, and read the file with onnx."""
    proto = onnx.load(path)
    expected = numpy_helper.to_array(proto.graph.initializer[0]).astype(np.int8)
    try:
        back = _round_trip(library, proto, "w")
        found = numpy_helper.to_array(next(t for t in back.graph.initializer if t.name == "w")).astype(np.int8)
    except Exception as e:
        return {"verdict": "refused" if type(e).__name__ == "ModelError" else f"fails ({type(e).__name__})"}
    return {"verdict": "right" if np.array_equal(found, expected) else "wrong"}


WORKERS: dict[str, Callable[[str, Path, int], dict[str, Any]]] = {
    "int4": int4,
    "memory": memory,
    "rewire": rewire,
    "metadata": metadata,
}

# the table ----------------------------------------------------------------------------------------


def measure(worker: str, library: str, path: Path, uses: int) -> dict[str, Any]:
    """Run one worker in a fresh process."""
    command = [sys.executable, __file__, "--worker", worker, "--library", library, "--path", str(path), "--uses", str(uses)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def collect(size: float, uses: int) -> dict[str, dict[str, dict[str, Any]]]:
    """All figures: worker -> library -> numbers."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in ("large", "shared", "int4")}
        write_large(files["large"], size)
        write_shared(files["shared"], uses)
        write_int4(files["int4"])
        model = {"int4": "int4", "memory": "large", "rewire": "shared", "metadata": "shared"}
        return {w: {lib: measure(w, lib, files[model[w]], uses) for lib in LIBRARIES} for w in WORKERS}


def rows(figures: dict[str, dict[str, dict[str, Any]]], size: float, uses: int) -> list[tuple[str, ...]]:
    """What was measured, one row each, a column a library."""

    def row(title: str, worker: str, show: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        cells = (figures[worker][lib] for lib in LIBRARIES)
        return (title, *(f"failed: {c['failed']}" if "failed" in c else show(c) for c in cells))

    return [
        ("", *LIBRARIES),
        row("INT4 constant set and saved", "int4", lambda c: c["verdict"]),
        row(f"{size / MB:.0f} MB model, one weight changed: peak", "memory", lambda c: f"{c['peak_mb']:.0f} MB"),
        row("    anonymous memory held afterwards", "memory", lambda c: f"{c['anonymous_mb']:.0f} MB"),
        row("    time", "memory", lambda c: f"{c['seconds']:.1f} s"),
        row(f"rewire a constant with {uses} uses, in order", "rewire", lambda c: f"{c['forward_s']:.3f} s"),
        row("    last use first", "rewire", lambda c: f"{c['reversed_s']:.3f} s"),
        row("nodes that keep their metadata", "metadata", lambda c: f"{c['nodes_kept']} of {c['nodes']}"),
        row("values that keep their metadata", "metadata", lambda c: f"{c['values_kept']} of {c['values']}"),
    ]


def parse_size(text: str) -> float:
    """`400MB`, `1.6GB` or a number of bytes."""
    match = re.fullmatch(r"([\d.]+)\s*(GB|MB|B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 400MB or 1.6GB")
    return float(match.group(1)) * {"GB": 1e9, "MB": 1e6, "B": 1.0}[(match.group(2) or "B").upper()]


def main() -> None:
    """Print the table, or be one worker."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=parse_size, default=400e6, help="weights of the large model (400MB)")
    parser.add_argument("--uses", type=int, default=2000, help="readers of the shared constant (2000)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    for hidden in ("--worker", "--library"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        importlib.import_module(MODULES[args.library])
        print(json.dumps(WORKERS[args.worker](args.library, args.path, args.uses)))
        return
    figures = collect(args.size, args.uses)
    if args.json:
        print(json.dumps(figures, indent=2))
        return
    for row in rows(figures, args.size, args.uses):
        print("  ".join(f"{cell:<48}" if i == 0 else f"{cell:<20}" for i, cell in enumerate(row)).rstrip())


if __name__ == "__main__":
    main()
