"""What is particular to insert-qdq."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.errors import UsageError
from tests.passes.measures import outputs, run_fused, sqnr_db
from tests.passes.models import fixture_arrays, stem
from tests.passes.running import context, pipeline


def test_unsigned_weights_are_the_same_weights_and_do_not_saturate() -> None:
    arrays = fixture_arrays("stem")
    signed, _ = pipeline("", stem(), arrays, context("ort"))
    unsigned, _ = pipeline("insert-qdq{weights=uint8}", stem(), arrays, context("ort"))
    stored = [n.inputs[0] for n in unsigned.graph if n.op_type == "DequantizeLinear" and n.inputs[0] and n.inputs[0].const_value]
    assert stored and all(v is not None and v.dtype != ir.DataType.INT8 for v in stored)
    exact = outputs(signed, arrays)[0]
    assert np.array_equal(exact, outputs(unsigned, arrays)[0])
    assert sqnr_db(exact, run_fused(unsigned, arrays)) > 35


def test_unsigned_weights_where_no_kernel_takes_them() -> None:
    with pytest.raises(UsageError, match="'trt' has no kernels for uint8 weights"):
        pipeline("insert-qdq{weights=uint8}", stem(), fixture_arrays("stem"), context("trt"))
