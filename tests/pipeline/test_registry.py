from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from qcompile.errors import UsageError, VerifyError
from qcompile.ir.model import Model
from qcompile.passes.surgery import GraphSurgery
from qcompile.pipeline import registry
from qcompile.pipeline.describe import describe_pass
from qcompile.pipeline.runner import Runner, drive
from qcompile.pipeline.spec import format_pipeline
from tests.ir import tiny
from tests.pipeline.fakes import FixedComparator, context


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three entry points of other packages: a good one, a missing module, and one that is no pass."""
    points = [
        EntryPoint("foreign", "tests.pipeline.fakes:Fake", registry.ENTRY_POINT_GROUP),
        EntryPoint("gone", "no_such_package_here:Pass", registry.ENTRY_POINT_GROUP),
        EntryPoint("nonsense", "tests.pipeline.fakes:context", registry.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.ENTRY_POINT_GROUP else [])
    registry._entry_points.cache_clear()
    yield
    registry._entry_points.cache_clear()


def test_entry_points_are_passes_like_ours(foreign: None) -> None:
    assert {"foreign", "smooth"} <= set(registry.names())
    (made,) = registry.parse("foreign")
    assert type(made).__name__ == "Fake"


@pytest.mark.parametrize(
    ("name", "words"), [("gone", "cannot be imported .* reinstall"), ("nonsense", "is not a subclass of qcompile.Pass")]
)
def test_a_broken_entry_point_is_a_usage_error(foreign: None, name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        registry.parse(name)


def test_names_are_listed_without_importing_passes() -> None:
    code = (
        "import sys\n"
        "from qcompile.pipeline import registry\n"
        "registry.names()\n"
        "loaded = [m for m in sys.modules if m.startswith('qcompile.passes.') and m != 'qcompile.passes.forms']\n"
        "assert not loaded, loaded\n"
        "registry.parse('gelu-order')\n"
        "assert 'qcompile.passes.forms.gelu_order' in sys.modules\n"
        "assert 'qcompile.passes.equivalent.smooth.smooth' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_all_registered_passes_know_their_name() -> None:
    assert all(registry.pass_named(name).name == name for name in registry.names())


SURGERY = """
import numpy as np
import qcompile

def double(graph):
    graph.outputs[0].inputs[0].inputs[1].values = graph.outputs[0].inputs[0].inputs[1].values * 2

@qcompile.surgery(kind="equivalent")
def honest(graph):
    for node in graph.nodes:
        node.name = "renamed_" + node.name

@qcompile.surgery(kind="equivalent")
def liar(graph):
    double(graph)

def nothing(graph):
    return graph

def breaks(graph):
    raise KeyError("no such layer")

number = 3
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "my_surgery.py"
    path.write_text(SURGERY)
    return path


def model() -> Model:
    return Model.from_proto(tiny.linear())


def test_a_users_function_is_a_pass(script: Path) -> None:
    text = f"{script}:double,repq"
    passes = registry.parse(text)
    assert (
        isinstance(passes[0], GraphSurgery)
        and format_pipeline(passes) == text
        and registry.parse(format_pipeline(passes)) == passes
    )
    after, (report,) = drive(Runner().steps(model(), passes[:1], context()))
    x = np.eye(4, dtype=np.float32)
    bias = np.asarray(model().graph.initializers["bias"].const_value)
    assert np.allclose(tiny.run(after, {"x": x}) - tiny.run(model(), {"x": x}), bias, atol=1e-6)
    assert report.verified.startswith("not verified") and [r.kind for r in report.remarks if r.node][-1] == "applied"


def test_a_surgery_starts_a_new_float_baseline(script: Path) -> None:
    compare = FixedComparator()
    passes = registry.parse(f"{script}:double,{script}:honest")
    _, reports = drive(Runner(comparator=compare).steps(model(), passes, context()))
    assert len(compare.seen) == 1 and reports[1].verified == "equal within tolerance"


def test_a_surgery_that_claims_to_be_equivalent_is_verified(script: Path) -> None:
    with pytest.raises(VerifyError, match=r"my_surgery.py:liar' moved the outputs by 0.5 of their size"):
        drive(Runner(comparator=FixedComparator(0.5)).steps(model(), registry.parse(f"{script}:liar"), context()))


def test_a_surgery_that_does_nothing_says_so(script: Path) -> None:
    _, (report,) = drive(Runner().steps(model(), registry.parse(f"{script}:nothing"), context()))
    assert not report.modified and report.remarks[0].reason == "the function changed nothing"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("breaks", r"my_surgery.py:\d+: KeyError: 'no such layer'"),
        ("missing", "has no function 'missing'"),
        ("number", "has no function 'number'"),
    ],
)
def test_errors_name_the_users_file(script: Path, function: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        drive(Runner().steps(model(), registry.parse(f"{script}:{function}"), context()))


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no surgery file at"):
        drive(Runner().steps(model(), registry.parse(f"{tmp_path}/none.py:f"), context()))


def test_a_preset_is_no_pass() -> None:
    with pytest.raises(UsageError, match=r"'repq-vit' is a preset, for --passes repq-vit: .*; name one of its passes"):
        describe_pass("repq-vit")
