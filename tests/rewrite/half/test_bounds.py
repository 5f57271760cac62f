"""Bounds from the weights hold on real values, and do not change under a fold."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qcompile.ir.model import Model
from qcompile.passes.forms.canonicalize.canonicalize import Canonicalize
from qcompile.pipeline.base import PassContext
from qcompile.quant.spec import SCHEMES
from qcompile.rewrite.half.bounds import upper_bounds
from qcompile.target.catalog import TARGETS
from tests.passes.models import fixture, fixture_arrays


def _values(model: Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    proto = model.to_proto()
    names = [o for n in proto.graph.node for o in n.output if o]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(None, feeds), strict=True))


@pytest.mark.parametrize("name", ["timm_vit_ts17", "timm_vit_shared_dy18", "hf_llama_dy23", "hybrid_ts17", "hf_bert_ts17"])
def test_no_value_exceeds_its_bound(name: str) -> None:
    model = fixture(name)
    Canonicalize().apply(model, PassContext(SCHEMES["w8a8"], TARGETS["rtx"]))
    bounds = upper_bounds(model.graph)
    feeds = {k: v for k, v in fixture_arrays(name).items() if k in {i.name for i in model.inputs()}}
    found = _values(model, feeds)
    finite = 0
    for value, array in found.items():
        if array.dtype == np.float32 and array.size and np.isfinite(bounds[value]):
            finite += 1
            assert float(np.abs(array).max()) <= bounds[value] * 1.0001, value
    assert finite > 0
