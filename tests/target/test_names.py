"""A target is a folder: the catalog finds it, its verbs name passes that exist, and nobody else compares its name."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest

import qcompile.target.catalog as catalog
from qcompile.errors import UsageError
from qcompile.pipeline import registry
from qcompile.quant.companding import companded_type
from qcompile.quant.qtype import FLOAT8E4M3FN, INT4, INT8, UINT8, qtype, simulated_int
from qcompile.quant.spec import SCHEMES
from qcompile.target.catalog import TARGETS

ROOT = Path(__file__).parents[2]
PAIRS = [(t.name, s) for t in TARGETS.values() for s in t.schemes]
HALF = {"float32": (), "float16": ("fp16",), "bfloat16": ("bf16",)}


def test_each_folder_is_a_target() -> None:
    folders = {p.parent.name for p in (ROOT / "qcompile/target").glob("*/target.py")}
    modules = {type(t).__module__.split(".")[-2] for t in TARGETS.values()}
    assert modules == folders and {"tensorrt", "ort", "integer", "openvino"} <= folders
    assert next(iter(TARGETS)) == catalog.DEFAULT and len({t.name for t in TARGETS.values()}) == len(TARGETS)


@pytest.mark.parametrize(("target", "scheme"), PAIRS)
def test_verbs_name_passes_that_exist(target: str, scheme: str) -> None:
    t, s = TARGETS[target], SCHEMES[scheme]
    assert {*t.forms(s), *t.lowering(s)} <= {*registry.names()}
    assert registry.parse(t.default(s)) or not t.default(s)
    assert t.lowering(s)[-1:] == (HALF[t.body(s)] or t.lowering(s)[-1:])
    assert t.rules and len({r.id for r in t.rules}) == len(t.rules)


def test_only_targets_compare_names() -> None:
    names = {*TARGETS}
    wrong: list[str] = []
    for folder in ("qcompile", "passes"):
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT).parts[:2] in (("qcompile", "target"), ("qcompile", "passes"))
            tree = ast.parse(path.read_text())
            compares = [] if inside else [n for n in ast.walk(tree) if isinstance(n, ast.Compare)]
            for c in compares:
                words = {k.value for k in ast.walk(c) if isinstance(k, ast.Constant) and isinstance(k.value, str)}
                if words & names and ".domain" not in ast.unparse(c):
                    wrong.append(f"{path.relative_to(ROOT)}:{c.lineno}: {ast.unparse(c)}")
    assert not wrong


def test_what_targets_can_hold() -> None:
    table, powers = companded_type("log2", 4, paper=False), qtype("log2u4@float8e4m3fn")
    can = {name: [t.expresses(q) for q in (INT8, FLOAT8E4M3FN, table, powers)] for name, t in TARGETS.items()}
    assert can["trt"] == can["rtx"] == [True, True, False, True]
    assert can["ort"] == [True, False, True, False]
    assert can["integer"] == can["openvino"] == [True, False, False, False]
    assert TARGETS["ort"].expresses(UINT8) and not TARGETS["trt"].expresses(UINT8)
    assert TARGETS["trt"].expresses(INT4) and TARGETS["trt"].expresses(simulated_int(6))


def test_schemes_of_other_targets_are_refused() -> None:
    with pytest.raises(UsageError, match="has no scheme 'nvfp4'"):
        TARGETS["ort"].require(SCHEMES["nvfp4"])


def test_a_package_can_bring_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points name a module that holds TARGETS."""

    class Entry:
        value = "tests.target.foreign"

    monkeypatch.setattr(catalog, "entry_points", lambda group: [Entry] if group == catalog.ENTRY_POINT_GROUP else [])
    assert {"mine", "trt", "ort"} <= {*catalog.Catalog()}
    Entry.value = "tests.target.graphs"
    with pytest.raises(UsageError, match="cannot be imported"):
        list(catalog.Catalog())


def test_variants_have_names_of_their_own() -> None:
    found = catalog.Catalog()
    name = found.add(replace(found["rtx"], name="rtx-float", half_body=False))
    assert found[name].lowering(SCHEMES["w8a8"]) == ("insert-qdq",) and "rtx-float" not in TARGETS
    with pytest.raises(UsageError, match="already"):
        found.add(found["rtx"])
