"""Large models: rewritten weights lie in scratch files, the output is streamed, nothing is left behind."""

from __future__ import annotations

import errno
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from qcompile.errors import ModelError
from qcompile.ir import spill
from qcompile.ir.edit import add_constant, set_constant
from qcompile.ir.model import Model
from qcompile.ir.spill import SpilledTensor, is_large, mark_large, scratch_folder, spilled
from tests.ir import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model that counts as large; tensors of 1 KiB are spilled."""
    monkeypatch.setattr(spill, "LARGE_MODEL", 1 << 14)
    monkeypatch.setattr(spill, "SPILLED_TENSOR", 1 << 10)
    return Model.from_proto(tiny.linear(64))


def files() -> list[Path]:
    gc.collect()  # graphs are cycles
    return sorted(scratch_folder().glob("*.data"))


def test_a_small_model_keeps_its_weights_in_memory() -> None:
    model = Model.from_proto(tiny.linear(64))
    value = add_constant(model.graph, "big", np.zeros((512, 512), np.float32))
    assert not is_large(model.graph) and isinstance(value.const_value, ir.Tensor)


def test_rewritten_weights_of_a_large_model_are_spilled(large: Model) -> None:
    array = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    value = set_constant(large.graph.node(0), 1, array)
    assert isinstance(value.const_value, SpilledTensor)
    assert np.array_equal(value.const_value.numpy(), array)
    assert isinstance(add_constant(large.graph, "small", array[0]).const_value, ir.Tensor)


def test_a_model_stays_large_when_its_weights_shrink(large: Model) -> None:
    assert is_large(large.graph)
    for node in (large.graph.node(0), large.graph.node(2)):
        node.replace_input_with(1, add_constant(large.graph, "codes", np.zeros((64, 64), np.int8)))
    del large.graph.initializers["w"]
    assert large.weight_bytes() < spill.LARGE_MODEL
    assert is_large(large.clone().graph)


def test_the_file_goes_with_the_tensor() -> None:
    before = files()
    tensor = spilled(ir.Tensor(np.arange(10), name="t"))
    assert len(files()) == len(before) + 1
    del tensor
    assert files() == before


@pytest.mark.parametrize("dtype", ["INT4", "UINT4", "FLOAT8E4M3FN", "BFLOAT16", "FLOAT4E2M1", "BOOL", "INT64"])
def test_every_type_survives_the_file(dtype: str) -> None:
    kind = ir.DataType[dtype]
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(kind.numpy())
    tensor = ir.Tensor(array, dtype=kind, name="t")
    back = spilled(tensor)
    assert back.tobytes() == tensor.tobytes() and back.numpy().tolist() == array.tolist()


def test_a_full_disk_is_told_and_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = files()
    monkeypatch.setattr(spill, "data_chunks", full)
    with pytest.raises(ModelError, match=r"no room for rewritten weights in .* set TMPDIR to a place with more space"):
        spilled(ir.Tensor(np.arange(10), name="t"))
    assert files() == before


def test_the_scratch_folder_goes_with_the_process() -> None:
    code = (
        "import numpy as np, onnx_ir as ir\nfrom qcompile.ir.spill import spilled, scratch_folder\n"
        "t = spilled(ir.Tensor(np.arange(9), name='t'))\nprint(scratch_folder())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert not Path(done.stdout.strip()).exists()


def test_a_streamed_file_is_the_same_model(large: Model, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    set_constant(large.graph.node(0), 1, rng.standard_normal((64, 64)))
    add_constant(large.graph, "four", np.ones((64, 64)).astype(ir.DataType.INT4.numpy()), ir.DataType.INT4)
    path = large.save(tmp_path / "out.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    assert Model.load(path).digest() == large.digest()
    again = Model.load(path)
    mark_large(again.graph)
    x: dict[str, NDArray[Any]] = {"x": rng.standard_normal((2, 64)).astype(np.float32)}
    assert tiny.run(path, x).tobytes() == tiny.run(large, x).tobytes() == tiny.run(again, x).tobytes()


def test_two_streamed_files_are_equal(large: Model, tmp_path: Path) -> None:
    paths = [large.save(tmp_path / name) for name in ("a.onnx", "b.onnx")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
