"""Each operator of the oracle against ONNX Runtime and onnx.reference, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.oracle.qlinear import SUMS
from qcompile.oracle.run import OPERATORS, run_integer
from tests.oracle.build import SETTINGS, model_of, on_ort, on_reference
from tests.oracle.cases import CASES, Case


def require_equal(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.array_equal(a, b)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_operator_equals_onnx_runtime_and_the_reference(case: Case) -> None:
    model = model_of([case.node], case.inputs, case.node.output, case.constants)
    ours = list(run_integer(model, case.inputs).values())
    for optimize, threads in SETTINGS:
        require_equal(ours, on_ort(model, case.inputs, optimize, threads))
    if case.reference:
        require_equal(ours, on_reference(model, case.inputs))


def test_every_operator_has_a_case() -> None:
    assert {c.node.op_type for c in CASES} >= OPERATORS - {"Identity"} - SUMS.keys()  # these: test_qlinear.py
