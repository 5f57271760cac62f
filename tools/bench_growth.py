"""How the cost of a compile grows with the graph: `w8a8` of transformers of 12.5k to 100k nodes, each in a process of its own.

python tools/bench_growth.py [--nodes 12500 --nodes 25000 ...] [--target trt] [--out FILE.json]

The layers are narrow (16 channels, 8 tokens), so that nodes count and not arithmetic; 4 samples, the target's default pipeline,
`--verify each`.  CPU time is user + system of the whole process; `x` is against the row before, per doubling of the nodes;
memory is the peak resident set over that of an empty graph's compile.  With `--out`, what is measured is kept there, and a
second run goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_compile import QCOMPILE, run

ROOT = Path(__file__).resolve().parents[1]
NODES = (12_500, 25_000, 50_000, 100_000)
EMPTY = 100
_GENERATE = """
import sys
import numpy as np, onnx
sys.path.insert(0, sys.argv[1])
import graphs
made = graphs.deep(int(sys.argv[2]))
onnx.save(made, sys.argv[3])
np.savez(sys.argv[4], input=np.random.default_rng(0).standard_normal((4, graphs.TOKENS, graphs.CHANNELS), np.float32))
print(len(made.graph.node))
"""


def measure(nodes: int, target: str, folder: Path) -> dict[str, Any]:
    """One compile."""
    model, data, log = folder / "m.onnx", folder / "m.npz", folder / f"{nodes}.log"
    run([sys.executable, "-c", _GENERATE, str(ROOT / "tools"), str(nodes), str(model), str(data)], log)
    made = int(log.read_text().split()[-1])
    words = ["--target", target, "--scheme", "w8a8", "--calib", str(data), "-o", str(folder / "out.onnx")]
    cost = run([sys.executable, "-c", QCOMPILE, str(model), *words], log)
    return {"asked": nodes, "nodes": made, "target": target, "cpu_s": cost.cpu_s, "wall_s": cost.wall_s, "peak_mb": cost.peak_mb}


def table(rows: list[dict[str, Any]]) -> str:
    """One line a size."""
    lines = [f"{'nodes':>8}{'CPU s':>9}{'wall s':>9}{'x a doubling':>14}{'peak MB':>9}{'kB a node':>11}"]
    empty = rows[0]
    for before, row in pairwise(rows):
        doublings = math.log2(row["nodes"] / before["nodes"])
        growth = "" if before is empty else f"{(row['cpu_s'] / before['cpu_s']) ** (1 / doublings):.2f}"
        each = 1e3 * (row["peak_mb"] - empty["peak_mb"]) / (row["nodes"] - empty["nodes"])
        lines.append(f"{row['nodes']:>8}{row['cpu_s']:>9.1f}{row['wall_s']:>9.1f}{growth:>14}{row['peak_mb']:>9.0f}{each:>11.1f}")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not known yet, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, action="append", default=[])
    parser.add_argument("--target", default="trt")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(args.out.read_text()) if args.out is not None and args.out.exists() else []
    wanted = [EMPTY, *sorted(args.nodes or NODES)]
    for nodes in wanted:
        if any((r["asked"], r["target"]) == (nodes, args.target) for r in rows):
            continue
        print(f"measuring {nodes} nodes", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(nodes, args.target, Path(folder)))
        if args.out is not None:
            args.out.write_text(json.dumps(rows, indent=1))
    known = {r["asked"]: r for r in rows if r["target"] == args.target}
    print(table([known[n] for n in wanted]))


if __name__ == "__main__":
    main()
