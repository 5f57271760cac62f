from __future__ import annotations

from collections.abc import Callable

import pytest
from onnx import helper

from qcompile.errors import VerifyError
from qcompile.ir.model import Model
from qcompile.ir.verify import verify_interface, verify_structure
from tests.ir import tiny


@pytest.mark.parametrize("build", [tiny.linear, tiny.fixed_vit, tiny.branches])
def test_sound_models_pass(build: Callable[[], object]) -> None:
    verify_structure(Model.from_proto(build()), "load")  # type: ignore[arg-type]


def test_two_omitted_outputs_are_no_clash() -> None:
    proto = tiny.linear()
    proto.graph.node[1].CopyFrom(helper.make_node("Dropout", ["h"], ["g", ""]))
    proto.graph.node.insert(2, helper.make_node("Dropout", ["g"], ["a", ""]))
    verify_structure(Model.from_proto(proto), "load")


def _order(model: Model) -> None:
    node = model.graph.node(0)
    model.graph.remove(node)
    model.graph.append(node)


def _double_name(model: Model) -> None:
    model.graph.node(1).name = model.graph.node(0).name


def _no_name(model: Model) -> None:
    model.graph.node(1).name = None


def _made_twice(model: Model) -> None:
    model.graph.node(1).outputs[0].name = "h"


def _lost_weight(model: Model) -> None:
    model.graph.initializers.pop("w")


def _lost_output(model: Model) -> None:
    model.graph.remove(model.graph.node(3))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_order, "reads 'h' before it is made"),
        (_double_name, "double node name 'MatMul_0'"),
        (_no_name, "missing or double node name None"),
        (_made_twice, "'h' is made twice"),
        (_lost_weight, "reads 'w' before it is made"),
        (_lost_output, "lost the graph output 'y'"),
    ],
)
def test_damage_is_named_with_the_pass(damage: Callable[[Model], None], message: str) -> None:
    model = Model.from_proto(tiny.linear())
    damage(model)
    with pytest.raises(VerifyError, match=f"'smooth'.*{message}.*please report it with the reproducer"):
        verify_structure(model, "smooth")


def test_another_interface_is_named() -> None:
    before = Model.from_proto(tiny.linear())
    after = before.clone()
    after.graph.outputs.append(after.graph.outputs[0])
    with pytest.raises(VerifyError, match=r"'smooth' changed the outputs y .* to y .*, y"):
        verify_interface(before, after, "smooth")
