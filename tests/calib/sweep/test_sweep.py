from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto as T
from onnx import helper

from qcompile.calib.data import Dataset, load_data
from qcompile.calib.observe import AbsMax, Histogram, MinMax, Moments, Probe, Rows, SecondMoment
from qcompile.calib.sweep.sweep import sweep
from qcompile.errors import DataError, ModelError
from qcompile.execute.session import make_session
from qcompile.ir.model import Model
from tests.calib.sweep.graphs import build, cnn, transformer

TOKENS = ["h", "ln", "scores", "res", "act", "out"]


def dataset(model: Model, tmp_path: Path, n: int = 11) -> Dataset:
    """n samples through an npz."""
    rng = np.random.default_rng(7)
    info = model.inputs()[0]
    shape = (n, *[int(d) for d in info.shape[1:] if isinstance(d, int)])
    array = rng.integers(0, 50, shape) if info.dtype.kind == "i" else rng.normal(size=shape).astype(np.float32)
    np.savez(tmp_path / "data.npz", **{info.name: array})
    return load_data(str(tmp_path / "data.npz"), model.inputs())


def reference(model: Model, data: Dataset, tensor: str, batch: int = 11) -> NDArray[Any]:
    """The raw tensor over all samples, optimizations off."""
    copy = model.clone()
    values = {str(v.name): v for node in copy.graph for v in node.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.append(values[tensor])
    values[tensor].type = ir.TensorType(ir.DataType.FLOAT)
    session = make_session(copy.to_proto().SerializeToString(), optimize="off", threads=1)
    return np.concatenate([np.asarray(session.run(None, feeds)[0]) for feeds in data.batches(batch)])


def close(a: Any, b: Any, rtol: float = 1e-5) -> None:
    left, right = a.to_arrays(), b.to_arrays()
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_allclose(array, right[name], rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize("observer", [MinMax(), MinMax(-1), AbsMax(), AbsMax(-1), Moments(-1), SecondMoment(), Rows(6)], ids=str)
def test_transformer_equals_numpy(opset: int, observer: Any, tmp_path: Path) -> None:
    model = transformer(opset)
    data = dataset(model, tmp_path)
    found = sweep(model, data, [Probe(t, observer) for t in TOKENS], batch=4, threads=1)
    for t in TOKENS:
        close(found[Probe(t, observer)], observer.observe(reference(model, data, t)))


@pytest.mark.parametrize("opset", [11, 17, 18])
@pytest.mark.parametrize("observer", [MinMax(), MinMax(1), AbsMax(1), Moments(1)], ids=str)
def test_cnn_equals_numpy(opset: int, observer: Any, tmp_path: Path) -> None:
    model = cnn(opset)
    data = dataset(model, tmp_path)
    found = sweep(model, data, [Probe(t, observer) for t in ("c1", "a1", "c2", "flat")], batch=3, threads=1)
    for probe, stat in found.items():
        close(stat, observer.observe(reference(model, data, probe.tensor)))


def test_batches_do_not_matter(tmp_path: Path) -> None:
    model = transformer()
    data = dataset(model, tmp_path)
    probes = [Probe("act", o) for o in (MinMax(), Histogram(64), Rows(5))]
    one, other = (sweep(model, data, probes, batch=b, threads=1) for b in (1, 5))
    assert one[probes[1]].counts.sum() == 11 * 5 * 16
    close(one[probes[0]], other[probes[0]])
    np.testing.assert_array_equal(one[probes[2]].ids, other[probes[2]].ids)


def test_extremes_in_the_graph_and_of_the_raw_tensor_agree(tmp_path: Path) -> None:
    model = transformer()
    data = dataset(model, tmp_path)
    alone = sweep(model, data, [Probe("ln", MinMax(-1))], threads=1)
    shared = sweep(model, data, [Probe("ln", MinMax(-1)), Probe("ln", Histogram())], threads=1)
    close(alone[Probe("ln", MinMax(-1))], shared[Probe("ln", MinMax(-1))], rtol=0)


def test_inputs_constants_and_graph_outputs(tmp_path: Path) -> None:
    model = cnn()
    data = dataset(model, tmp_path)
    x = np.concatenate([b["x"] for b in data.batches(4)])
    found = sweep(model, data, [Probe("x", MinMax(1)), Probe("x", Histogram()), Probe("k1", AbsMax()), Probe("logits", MinMax())])
    close(found[Probe("x", MinMax(1))], MinMax(1).observe(x))
    assert found[Probe("x", Histogram())].total == x.size
    k1 = model.graph.initializers["k1"].const_value
    assert k1 is not None
    assert found[Probe("k1", AbsMax())].hi == np.abs(k1.numpy()).max()


def test_integer_tensors(tmp_path: Path) -> None:
    model = transformer()
    data = dataset(model, tmp_path)
    stat = sweep(model, data, [Probe("ids", MinMax())])[Probe("ids", MinMax())]
    ids = np.concatenate([b["ids"] for b in data.batches(4)])
    assert (stat.lo, stat.hi) == (ids.min(), ids.max())


def test_source_model_is_untouched(tmp_path: Path) -> None:
    model = transformer()
    before = model.digest()
    sweep(model, dataset(model, tmp_path), [Probe("ln", MinMax(-1)), Probe("act", Histogram())], threads=1)
    assert model.digest() == before


def test_unneeded_nodes_are_not_run(tmp_path: Path) -> None:
    """The tail behind the last probe fails at run time, and is never run."""
    nodes = [
        helper.make_node("Relu", ["x"], ["y"], name="early"),
        helper.make_node("Reshape", ["y", "bad"], ["z"], name="late"),
    ]
    model = build(nodes, {"x": (T.FLOAT, ["N", 6])}, "z", {"bad": np.array([5, 5, 5], np.int64)})
    found = sweep(model, dataset(model, tmp_path), [Probe("y", MinMax())], threads=1)
    assert found[Probe("y", MinMax())].lo == 0


@pytest.mark.parametrize("batch", [1, 3])
def test_fixed_batch_decides(batch: int, tmp_path: Path) -> None:
    model = cnn(batch=batch)
    calls: list[tuple[int, int]] = []
    sweep(model, dataset(model, tmp_path), [Probe("c1", MinMax())], batch=8, progress=lambda done, of: calls.append((done, of)))
    assert calls == [(done, 11) for done in range(batch, 12, batch)]


def test_fewer_samples_than_the_fixed_batch(tmp_path: Path) -> None:
    model = cnn(batch=3)
    data = dataset(model, tmp_path).take(2)
    with pytest.raises(DataError, match="holds 2 samples and the model needs 3 a run"):
        sweep(model, data, [Probe("c1", MinMax())])


def _log_model(dtype: type[np.floating[Any]] = np.float32) -> Model:
    nodes = [
        helper.make_node("Log", ["x"], ["bad"], name="log"),
        helper.make_node("Add", ["bad", "one"], ["y"], name="late"),
    ]
    elem = T.FLOAT if dtype is np.float32 else T.FLOAT16
    return build(nodes, {"x": (elem, ["N", 4])}, "y", {"one": np.ones(1, dtype)}, elem=elem)


@pytest.mark.parametrize("observer", [MinMax(), MinMax(-1), AbsMax(), Histogram(), SecondMoment()], ids=str)
@pytest.mark.parametrize(("value", "what"), [(-1.0, "NaN"), (0.0, "infinite values")])
def test_nan_and_inf_are_named(observer: Any, value: float, what: str, tmp_path: Path) -> None:
    x = np.ones((9, 4), np.float32)
    x[5, 2] = value
    np.savez(tmp_path / "d.npz", x=x)
    model = _log_model()
    data = load_data(str(tmp_path / "d.npz"), model.inputs())
    with pytest.raises(DataError, match=rf"tensor 'bad', made by node 'log' \(Log\), has {what} from sample 5 on"):
        sweep(model, data, [Probe("bad", observer)], batch=4, threads=1)


def test_a_float16_sum_may_overflow(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["x", "big"], ["y"], name="mul")]
    model = build(nodes, {"x": (T.FLOAT16, ["N", 4])}, "y", {"big": np.array([60000], np.float16)}, elem=T.FLOAT16)
    np.savez(tmp_path / "d.npz", x=np.ones((9, 4), np.float16))
    found = sweep(model, load_data(str(tmp_path / "d.npz"), model.inputs()), [Probe("y", MinMax())])
    assert found[Probe("y", MinMax())].hi == np.float16(60000)


def test_unknown_tensor(tmp_path: Path) -> None:
    model = cnn()
    with pytest.raises(ModelError, match="no tensor 'nope'"):
        sweep(model, dataset(model, tmp_path), [Probe("nope", MinMax())])


def test_no_probes_no_run(tmp_path: Path) -> None:
    model = cnn()
    assert sweep(model, dataset(model, tmp_path), []) == {}
