"""How often one compile of the shipped transformer looks at what: no wall clock, only counts."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import qcompile.structure
from qcompile.decide import decisions
from qcompile.report import SILENT
from qcompile.verbs.compile.job import prepare
from qcompile.verbs.compile.options import Options
from qcompile.verbs.compile.run import Result, run

MODEL = Path(__file__).parents[2] / "models" / "vit_digits.onnx"


def compiled(folder: Path) -> Result:
    options = Options(passes="repq,smooth", target="rtx", samples=16, output=str(folder / "out.onnx"))
    return run(prepare(MODEL, options), SILENT)


def finders() -> dict[CodeType, str]:
    """The code of every finder that remembers its answer."""
    package = qcompile.structure
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    own = [(m, f) for m in modules for f in vars(m).values() if getattr(f, "__module__", None) == m.__name__]
    return {f.__wrapped__.__code__: f.__name__ for _, f in own if hasattr(f, "__wrapped__")}


def version(graph: Any) -> int:
    return hash(tuple((n.name, n.op_type, tuple(v and v.name for v in n.inputs)) for n in graph))


def test_each_structure_is_looked_for_once_in_each_version_of_the_graph(tmp_path: Path) -> None:
    known, looked = finders(), Counter[tuple[str, int]]()

    def watch(frame: FrameType, event: str, arg: object) -> None:
        if event == "call" and frame.f_code in known:
            looked[known[frame.f_code], version(frame.f_locals["graph"])] += 1

    sys.setprofile(watch)
    try:
        compiled(tmp_path)
    finally:
        sys.setprofile(None)
    assert {"find_norm_to_linears", "find_v_projections", "find_mlps", "find_attentions"} <= {name for name, _ in looked}
    assert set(looked.values()) == {1}, looked.most_common(3)


def test_one_sweep_and_no_decision_read_from_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Counter[str]()
    monkeypatch.setattr(decisions, "from_text", lambda text: read.update([text]))
    assert compiled(tmp_path).sweeps == 1 and not read
