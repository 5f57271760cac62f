from __future__ import annotations

import pytest

from qcompile.decide.decisions import decisions
from qcompile.ir.model import Model
from qcompile.ir.text import print_model
from qcompile.pipeline import registry
from tests.passes.companded import arrays, said
from tests.passes.measures import outputs, relative_error
from tests.passes.models import block
from tests.passes.running import context, pipeline, run_passes


@pytest.mark.parametrize("scheme", ["w8a8", "w4a4"])
def test_bias_reparameterization_is_exact(scheme: str) -> None:
    """(Q(x + d) - d) Wq + c == Q(x + d) Wq + (c - d colsum(Wq)), with the rounded weight."""
    front, ctx = "canonicalize,annotate,compand-gelu,rtn", context("ort", scheme)
    coded, _ = run_passes(block(), registry.parse(front), arrays(), ctx)
    moved, reports = run_passes(coded, registry.parse("bias-reparam"), arrays(), ctx)
    assert said(reports, "bias-reparam") == [("applied", "fc2", "the shift of its codes moved into its bias")]
    shifts = [d.qparams.curve[2] for m in (coded, moved) for d in gelu_decisions(m) if d.qparams is not None]
    assert shifts[0] > 0.16 and shifts[1] == 0.0
    ends = [run_passes(m, registry.parse("insert-qdq"), arrays(), ctx)[0] for m in (coded, moved)]
    assert relative_error(outputs(ends[0], arrays()), outputs(ends[1], arrays())) <= 2e-6
    again, _ = run_passes(moved, registry.parse("bias-reparam"), arrays(), ctx)
    assert again.digest() == moved.digest()


def gelu_decisions(model: Model) -> list:
    return [d for _, _, d in decisions(model.graph) if d.spec.qtype.name.startswith("adalog")]


def test_bias_reparam_alone_brings_its_codes() -> None:
    made, reports = pipeline("bias-reparam", block(), arrays(), context("ort"))
    assert [r.kind for r in reports[-2].remarks + reports[-1].remarks if r.pass_name == "bias-reparam"] == ["applied"]
    assert "Less" in print_model(made)
