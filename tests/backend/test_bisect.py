"""The search for the Q/DQ groups that break a build."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.backend import bisect as room
from qcompile.backend.bisect import Bisection, bisect, ddmin
from qcompile.backend.groups import Group, qdq_groups
from qcompile.backend.tensorrt import BuiltPlan, build_engine
from qcompile.errors import BuildError
from qcompile.target.view import GraphView
from qcompile.verbs.build import make_engine
from tests.backend.chains import LAYERS, chain


def groups(n: int) -> list[Group]:
    return [Group((f"n{i}",), frozenset({f"q{i}"})) for i in range(n)]


@given(st.integers(1, 24).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1, max_size=4))))
def test_ddmin_finds_exactly_the_culprits(case: tuple[int, set[int]]) -> None:
    items = groups(case[0])
    wanted = {items[i] for i in case[1]}
    assert set(ddmin(items, lambda kept: wanted <= set(kept))) == wanted


def test_ddmin_is_logarithmic_for_one_culprit() -> None:
    items, tried = groups(128), []

    def fails(kept: Sequence[Group]) -> bool:
        tried.append(1)
        return items[77] in kept

    assert ddmin(items, fails) == [items[77]] and len(tried) <= 16


def refusing(monkeypatch: pytest.MonkeyPatch, bad: set[str], together: bool = False, always: bool = False) -> list[int]:
    """Builds fail while the Q/DQ of a node in `bad` (or of all of them) are there; returns the list of build sizes."""
    sizes: list[int] = []

    def build(path: Path, out: Path | None, **options: Any) -> BuiltPlan:
        left = {n for g in qdq_groups(GraphView.open(path)) for n in g.nodes}
        sizes.append(len(left))
        if always or (bad <= left if together else bad & left):
            raise BuildError("no kernel")
        return BuiltPlan("1", 0.1, 1, "")

    monkeypatch.setattr(room, "run_worker", build)
    monkeypatch.setattr(room, "check", lambda *a: [])
    return sizes


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.onnx"
    onnx.save(chain({}), str(path))
    return path


def search(path: Path, **options: Any) -> Bisection:
    return bisect(path, "no kernel", target="rtx", gpus=["sm89"], **options)


@pytest.mark.parametrize("bad", [{"n_fc3"}, {"n_fc0", "n_fc5"}, {"n_fc1", "n_fc2", "n_fc4"}])
def test_independent_culprits_are_all_found(bad: set[str], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, bad)
    found = search(model)
    assert set(found.nodes) == bad and len(found.culprits) == len(bad) and found.rest_builds
    assert "with these in float the rest builds" in found.advice() and "(only together)" not in found.advice()


def test_culprits_that_break_only_together(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, {"n_fc1", "n_fc4"}, together=True)
    found = search(model)
    assert found.nodes == ("n_fc1", "n_fc4") and len(found.culprits) == 1
    assert "n_fc1, n_fc4 (only together)" in found.advice()


def test_the_limit_and_the_notes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = refusing(monkeypatch, {"n_fc3"})
    said: list[str] = []
    found = search(model, limit=2, progress=said.append)
    assert len(sizes) == found.builds == len(said) == 2 and sizes[0] == 0 and not found.rest_builds
    assert said[0] == f"looking for the cause, build 1: 0 of {LAYERS} groups quantized: builds"
    assert "no cause found in 2 builds" in found.advice()


def test_a_model_that_fails_in_float_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = refusing(monkeypatch, set(), always=True)
    found = search(model)
    assert sizes == [0] and found.culprits == ()
    assert found.advice() == "it is not the quantization: the model without any Q/DQ fails too (no kernel)"


def test_a_model_without_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.onnx"
    view = GraphView.open(chain({}))
    onnx.save(room.without(view, qdq_groups(view)), str(path))
    assert refusing(monkeypatch, set()) == [] and "holds no Q/DQ" in search(path).advice()


def test_weights_outside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(chain({}), str(path), save_as_external_data=True, location="w.bin", size_threshold=0)
    refusing(monkeypatch, {"n_fc2"})
    assert search(path).nodes == ("n_fc2",)


def test_one_rule_broken_everywhere_is_one_culprit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(chain(dict.fromkeys(range(LAYERS), "zero point")), str(path))
    check = room.check
    sizes = refusing(monkeypatch, {f"n_fc{i}" for i in range(LAYERS)})
    monkeypatch.setattr(room, "check", check)
    (culprit,) = search(path).culprits
    assert len(culprit.groups) == 1 and len(culprit.same_rule) == LAYERS - 1 and len(sizes) <= 6
    assert "(and 5 more groups by the same rule); quantize symmetrically (zero point 0), or compile" in search(path).advice()


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("broken", "op", "rule"),
    [
        ({4: "computed scale"}, "Conv", "QC-TRT-004"),  # the builder dies of it (signal 11)
        ({1: "zero point", 4: "mixed"}, "MatMul", "QC-TRT-001"),
    ],
)
def test_the_real_builder(broken: dict[int, str], op: str, rule: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path, out, said = tmp_path / "m.onnx", tmp_path / "m.engine", list[str]()
    onnx.save(chain(broken, op), str(path), save_as_external_data=op == "MatMul", location="w.bin", size_threshold=0)
    with pytest.raises(BuildError) as caught:
        make_engine(path, out, target="rtx", gpus=["sm89"], note=said.append)
    message = str(caught.value)
    keep = " ".join(f"--keep-float 'n_fc{i}'" for i in broken)
    assert f"or compile with {keep} (with these in float the rest builds)" in message and rule in message
    assert ("crashed (signal" in message) == ("computed scale" in broken.values())
    assert {p.name for p in tmp_path.iterdir()} <= {"m.onnx", "w.bin"} and len(said) < 12


@pytest.mark.rtx
def test_the_real_builder_without_any_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "m.onnx"
    onnx.save(chain({2: "mixed"}), str(path))
    monkeypatch.setattr(room, "check", lambda *a: [])
    with pytest.raises(BuildError) as caught:
        build_engine(path, tmp_path / "m.engine", target="rtx")
    found = bisect(path, str(caught.value), target="rtx", gpus=["sm89"])
    assert found.nodes == ("n_fc2",) and found.rest_builds and found.builds <= 12
