"""The demo: one vision transformer, two artefacts, one table.  Run it with `make demo`; output goes to demo/.

Everything goes through the command line as a user types it; each command is shown before it runs.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
OUT = Path("demo")
MODEL = "models/vit_digits.onnx"
DATA = "models/vit_digits.eval.npz"
PASSES = "repq,smooth"
GPU = "sm89"
Document = dict[str, Any]
Row = tuple[str, Callable[[Document], str]]


def qcompile(*arguments: str) -> Document:
    """Run one command with --json; its progress goes to standard error as usual."""
    sys.stderr.write(f"\n$ qcompile {shlex.join(arguments)}\n")
    sys.stderr.flush()
    command = [sys.executable, "-m", "qcompile", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    if done.returncode not in (0, 1) or not done.stdout:
        sys.exit(done.returncode or 1)
    return json.loads(done.stdout)


def artefact(target: str, *more: str) -> Document:
    """Compile for `target`, check it, and evaluate it on data that calibration has not seen."""
    path = str(OUT / f"vit_digits.{target}.onnx")
    made = qcompile(MODEL, "--passes", PASSES, "--target", target, "-o", path, *more)
    rules = qcompile("check", path, "--target", target)
    return {"path": path, "compile": made, "check": rules, "eval": qcompile("eval", MODEL, path, "--data", DATA)}


def percent(value: float | None) -> str:
    """0.5 -> 50.0 %."""
    return "-" if value is None else f"{100 * value:.1f} %"


def audit_figure(key: str) -> Callable[[Document], str]:
    """A figure of the engine's audit; targets without an engine have none."""
    return lambda a: percent(a["compile"]["engine"]["audits"][GPU][key]) if "engine" in a["compile"] else "-"


def attention(a: Document) -> str:
    """Attention blocks that run as one kernel."""
    if "engine" not in a["compile"]:
        return "-"
    audit = a["compile"]["engine"]["audits"][GPU]
    return f"{audit['attention_fused_blocks']} of {audit['attention_blocks']}"


def latency(a: Document) -> str:
    """How many times as fast as float on ONNX Runtime CPU; only for the artefact made for it."""
    if "bench" not in a:
        return "-"
    ratio = a["bench"]["ratios"][1]
    return f"{ratio['median']:.2f}x ({ratio['min']:.2f}x)"


ROWS: list[Row] = [
    ("top-1 float", lambda a: percent(a["eval"]["reference"]["top1"])),
    ("top-1 int8", lambda a: percent(a["eval"]["candidate"]["top1"])),
    ("agreement", lambda a: percent(a["eval"]["agreement"])),
    ("SQNR of the logits", lambda a: f"{a['eval']['sqnr_db']:.1f} dB"),
    ("size, float", lambda a: f"{a['eval']['reference']['size_mb']:.2f} MB"),
    ("size, int8", lambda a: f"{a['eval']['candidate']['size_mb']:.2f} MB"),
    ("broken rules of the target", lambda a: str(len(a["check"]["errors"]))),
    ("speed on ORT CPU, median (min)", latency),
    (f"audit {GPU}: share of planned work in int8", audit_figure("share")),
    (f"audit {GPU}: coverage of all work", audit_figure("coverage")),
    (f"audit {GPU}: attention blocks fused", attention),
]


def main() -> None:
    """Make both artefacts and print the table."""
    (ROOT / OUT).mkdir(exist_ok=True)
    ort = artefact("ort")
    ort["bench"] = qcompile("bench", MODEL, ort["path"])
    rtx = artefact("rtx", "--engine", str(OUT / "vit_digits.engine"), "--gpu", GPU)
    table = Table(title=f"\n{MODEL} --passes {PASSES}", title_justify="left")
    table.add_column("")
    for name in ("--target ort", "--target rtx"):
        table.add_column(name, justify="right")
    for label, figure in ROWS:
        table.add_row(label, figure(ort), figure(rtx))
    Console().print(table)
    print(f"{rtx['eval']['samples']} held-out digits; artefacts in {OUT}/")
    print("The engine was built and its kernels were read from the build (TensorRT-RTX, a proxy); nothing ran on a GPU.")


if __name__ == "__main__":
    main()
