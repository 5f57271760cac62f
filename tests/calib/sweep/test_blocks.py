"""A sweep in blocks: the same statistics as in one go, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from qcompile.calib.data.dataset import Dataset
from qcompile.calib.data.readers import ArrayReader
from qcompile.calib.observe import Extremes, Histogram, MinMax, Moments, Observer, Probe, Rows, SecondMoment, Stat
from qcompile.calib.sweep import blocks as blocks_module
from qcompile.calib.sweep.blocks import Keep, Spool, block_bytes, blocked_sweep
from qcompile.calib.sweep.sweep import sweep
from qcompile.errors import DataError
from qcompile.ir.model import Model
from qcompile.ir.spill import mark_large
from tests.ir.test_cut import chain
from tests.structure import exports

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
    tensors = dict.fromkeys(
        str(v.name) for v in reads if v is not None and v.const_value is None and v.dtype == ir.DataType.FLOAT
    )
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


@pytest.mark.parametrize("name", ["hf_bert_ts17", "resnet_dy18"])
def test_blocks_go_on_where_an_earlier_run_stopped(name: str) -> None:
    model, data = large(name), dataset(name, 150)
    probes, limit = probes_of(model), model.weight_bytes() // 3
    stops: list[int] = []
    whole = blocked_sweep(model, data, probes, limit=limit, threads=1, on_batch=lambda _, n: stops.append(n))
    assert stops == [64, 128, 150]
    first = blocked_sweep(model, data, probes, limit=limit, threads=1, stop=64)
    rest = blocked_sweep(model, data, probes, limit=limit, threads=1, start=64, known=first)
    assert same(whole, rest) and same(whole, sweep(model, data, probes, threads=1))


def test_progress_counts_every_block() -> None:
    model, seen = large("resnet_dy18"), list[tuple[int, int]]()
    probes = probes_of(model)
    blocked_sweep(model, dataset("resnet_dy18", 8), probes, limit=model.weight_bytes() // 3, progress=lambda *n: seen.append(n))
    assert seen[-1][0] == seen[-1][1] and seen[-1][1] % 8 == 0 and seen[-1][1] > 8


def test_a_mask_of_infinities_may_cross() -> None:
    """x -> h; mask = log(keep) holds -inf; y = Softmax(h W + mask)."""
    text = """
    <ir_version: 9, opset_import: ["" : 17]>
    g (float[N,8] x, float[1,8] keep) => (float[N,8] y) {
      mask = Log(keep)
      h = MatMul(x, w1)
      g = MatMul(h, w2)
      s = Add(g, mask)
      y = Softmax(s)
    }
    """
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    proto.graph.initializer.extend(numpy_helper.from_array(rng.normal(size=(8, 8)).astype(np.float32), n) for n in ("w1", "w2"))
    model = Model.from_proto(onnx.shape_inference.infer_shapes(proto))
    mark_large(model.graph)
    x, keep = rng.normal(size=(16, 8)).astype(np.float32), np.tile(np.array([[1] * 7 + [0]], np.float32), (16, 1))
    data = Dataset(
        ArrayReader({"x": x, "keep": keep}, dict.fromkeys(("x", "keep"), x.dtype), {}), tuple(range(16)), ("x", "keep"), "here"
    )
    probes = [Probe("h", Moments(-1)), Probe("y", MinMax())]
    assert same(sweep(model, data, probes, batch=1, threads=1), blocked_sweep(model, data, probes, limit=300, batch=1, threads=1))


def test_a_disk_without_room_is_told(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "missing" / "a.data")
    with pytest.raises(DataError, match=r"no room for the activations .* set TMPDIR"):
        Keep(spool).observe(np.zeros(3))


def test_what_runs_in_blocks() -> None:
    model = Model(exports.load("resnet_dy18"))
    weights = model.weight_bytes()
    assert block_bytes(model) is None and block_bytes(model, 100 * weights) is None
    assert block_bytes(model, 4 * weights) == weights // 4
    mark_large(model.graph)
    assert block_bytes(model) is None and block_bytes(model, 4 * weights) is None
    assert block_bytes(model, weights) == weights // 4


def test_a_large_model_that_dequantizes_runs_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.from_proto(chain(4, quantized=True))
    mark_large(model.graph)
    assert block_bytes(model) is None
    monkeypatch.setattr(blocks_module, "_COMPUTED", 1024)
    assert block_bytes(model) == 1024 and block_bytes(model, 800) == 200
