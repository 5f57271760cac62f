"""A sweep in blocks: the same statistics as in one go, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from qcompile.calib import blocks as blocks_module
from qcompile.calib.blocks import Keep, Spool, block_bytes, blocked_sweep
from qcompile.calib.data import Dataset, fixed_batch
from qcompile.calib.observers import Extremes, Histogram, MinMax, Moments, Observer, Probe, Rows, SecondMoment, Stat
from qcompile.calib.readers import ArrayReader
from qcompile.calib.sweep import sweep
from qcompile.errors import DataError
from qcompile.ir import spill
from qcompile.ir.model import Model
from qcompile.ir.spill import mark_large
from tests.ir import exports

OBSERVERS: tuple[Observer, ...] = (MinMax(), MinMax(-1), Histogram(64), Moments(-1), SecondMoment(), Rows(8), Extremes(4))
NAMES = ["hf_bert_ts17", "hf_gpt2_dy18", "hf_llama_ts17", "timm_vit_ts17", "timm_vit_eager_ts17", "resnet_dy18", "unet_ts17"]


def dataset(name: str, samples: int) -> Dataset:
    arrays = exports.feeds(name, samples)
    if any(len(a) != samples for a in arrays.values()):  # a fixed batch
        arrays = {n: np.random.default_rng(1).standard_normal((samples, *a.shape[1:])).astype(a.dtype) for n, a in arrays.items()}
    return Dataset(ArrayReader(arrays, {n: a.dtype for n, a in arrays.items()}, {}), tuple(range(samples)), tuple(arrays), "here")


def large(name: str) -> Model:
    model = Model(exports.load(name))
    mark_large(model.graph)
    return model


def probes_of(model: Model) -> list[Probe]:
    """All observers on what every MatMul, Gemm and Conv reads, and on the inputs."""
    reads = [n.inputs[0] for n in model.graph if n.op_type in ("MatMul", "Gemm", "Conv")]
    tensors = dict.fromkeys(str(v.name) for v in reads if v is not None and v.const_value is None and v.dtype == ir.DataType.FLOAT)
    return [Probe(t, o) for t in tensors for o in OBSERVERS]


def same(a: dict[Probe, Stat], b: dict[Probe, Stat]) -> bool:
    return a.keys() == b.keys() and all(_equal(a[p].to_arrays(), b[p].to_arrays()) for p in a)


def _equal(a: dict[str, NDArray[Any]], b: dict[str, NDArray[Any]]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k], equal_nan=a[k].dtype.kind == "f") for k in a)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_give_the_statistics_of_one_sweep(name: str) -> None:
    model, data = large(name), dataset(name, 23)
    probes = probes_of(model)
    whole = sweep(model, data, probes, batch=4, threads=1)
    parts = blocked_sweep(model, data, probes, limit=model.weight_bytes() // 4, batch=4, threads=1)
    assert same(whole, parts)
