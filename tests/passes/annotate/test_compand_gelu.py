from __future__ import annotations

import pytest
from onnx import helper

from qcompile.pipeline import registry
from tests.passes.companded import arrays, relu_block
from tests.passes.models import block
from tests.passes.running import context, step

node = helper.make_node


@pytest.mark.parametrize("spec", ["compand-gelu", "compand-gelu{kind=twin}"])
def test_relu_is_refused(spec: str) -> None:
    done = step(registry.parse(spec)[0], relu_block(), arrays(), context("ort"))
    assert not done.changed and [r.node for r in done.report.remarks] == ["fc2"]
    assert "not a GELU" in done.report.remarks[0].reason


def test_a_target_without_companded_codes_is_refused() -> None:
    done = step(registry.parse("compand-gelu")[0], block(), arrays(), context("trt"))
    assert not done.changed and not done.report.modified
    assert [(r.kind, r.node) for r in done.report.remarks] == [("missed", "fc2")]
    assert "split-range" in done.report.remarks[0].reason


def test_a_site_that_the_user_keeps_in_float() -> None:
    done = step(registry.parse("compand-gelu")[0], block(), arrays(), context("ort", keep_float=("fc2",)))
    assert not done.changed and all("--keep-float" in r.reason for r in done.report.remarks)
