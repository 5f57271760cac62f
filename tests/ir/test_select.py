"""The grammar of --keep-float, --only, --quantize and --bits."""

from __future__ import annotations

import pytest

from qcompile.errors import UsageError
from qcompile.ir.select import ORIGIN, exactly, require_selector, selected, with_width
from qcompile.quant.qtype import INT8, simulated_int
from tests.passes.models import block, stem

BRANCH = {"erf", "add", "half_mul", "gelu"}
FIRST_HALF = {"conv1", "bn1", "relu1", "pad1", "conv2"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("conv1", {"conv1"}),
        ("conv*", {"conv1", "conv2"}),
        ("re:^(erf|add)$", {"erf", "add"}),
        ("op:Conv", {"conv1", "conv2"}),
        ("op:G*", {"pool", "head"}),
        ("region:conv1..conv2", FIRST_HALF),
        ("region:..conv2", FIRST_HALF),
        ("region:x..p1", FIRST_HALF - {"conv2"}),
        ("region:pool..", {"pool", "flatten", "head"}),
        ("region:pooled..", {"flatten", "head"}),
        ("region:d..gelu", BRANCH),
        ("region:conv2..conv1", set[str]()),
        ("region:nowhere..conv1", set[str]()),
        ("region:conv1..nowhere", set[str]()),
        ("op:MatMul", set[str]()),
        ("nothing", set[str]()),
    ],
)
def test_what_a_selector_chooses(text: str, expected: set[str]) -> None:
    require_selector(text)
    assert {str(n.name) for n in selected(text, stem().graph)} == expected


@pytest.mark.parametrize("name", ["layers[0]/fc", "a*b", "what?", "re:(", "op:Conv", "region:a..b", "plain"])
def test_the_selector_of_a_name_chooses_that_name_alone(name: str) -> None:
    graph = stem().graph
    first, second, *_ = graph
    first.name, second.name = name, name.translate(str.maketrans("*?[]", "xy0z")) + "1"
    require_selector(exactly(name))
    assert selected(exactly(name), graph) == {first}


def test_a_region_takes_every_path_between_its_ends() -> None:
    names = {str(n.name) for n in selected("region:norm1..pv", block().graph)}
    assert {"qkv", "split", "q", "k", "v", "scores", "softmax", "pv"} <= names
    assert not names & {"proj", "residual1", "fc1"}


def test_a_node_is_found_by_the_name_of_the_node_that_it_replaces() -> None:
    graph = stem().graph
    node = next(n for n in graph if n.name == "conv2")
    node.name, node.metadata_props[ORIGIN] = "conv2_part", "conv2"
    assert selected("conv2", graph) == selected("conv2_part", graph) == {node}
    assert node in selected("region:conv2..", graph)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("re:(", "not a regular expression"),
        ("op:", "no operator type"),
        ("region:..", "no ends"),
        ("region:", "no ends"),
    ],
)
def test_malformed_selectors_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        require_selector(text)


def test_widths_stand_behind_a_selector() -> None:
    selector, scheme = with_width("re:a=[12]=w4a6")
    assert selector == "re:a=[12]" and scheme.name == "w4a6"
    assert (scheme.weight, scheme.activation) == (simulated_int(4), simulated_int(6))
    assert with_width("fc*=w8a8")[1].weight == INT8


@pytest.mark.parametrize(("text", "message"), [("fc*", "no width"), ("fc*=w9a8", "no width"), ("=w4a4", "empty")])
def test_malformed_widths_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_width(text)
