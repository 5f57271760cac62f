from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from qcompile.calib.data import Dataset, find_beside, fixed_batch, load_data
from qcompile.errors import DataError
from qcompile.ir.model import InputInfo

PICTURE = [InputInfo("input", np.dtype(np.float32), ("N", 3, 8, 8))]
TOKENS = [InputInfo("ids", np.dtype(np.int64), ("N", "T")), InputInfo("mask", np.dtype(np.int64), ("N", "T"))]
F32 = np.float32


def save(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def everything(data: Dataset, name: str, size: int = 3) -> NDArray[Any]:
    return np.concatenate([b[name] for b in data.batches(size)])


def picture_folder(folder: Path, n: int = 5, side: int = 8) -> Path:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


class TestNpz:
    def test_round_trip(self, tmp_path: Path) -> None:
        x = np.random.default_rng(0).normal(size=(7, 3, 8, 8)).astype(F32)
        data = load_data(save(tmp_path / "d.npz", input=x, labels=np.arange(7), extra=np.zeros(3)), PICTURE)
        assert (len(data), data.names, data.random) == (7, ("input",), False)
        assert [len(b["input"]) for b in data.batches(3)] == [3, 3, 1]
        np.testing.assert_array_equal(everything(data, "input"), x)
        np.testing.assert_array_equal(np.asarray(data.labels), np.arange(7))

    def test_samples_are_spread_evenly(self, tmp_path: Path) -> None:
        x = np.arange(10, dtype=F32).reshape(10, 1, 1, 1) * np.ones((1, 3, 8, 8), F32)
        data = load_data(save(tmp_path / "d.npz", input=x, labels=np.arange(10)), PICTURE, samples=4)
        np.testing.assert_array_equal(np.asarray(data.labels), [0, 2, 5, 7])
        np.testing.assert_array_equal(everything(data, "input")[:, 0, 0, 0], [0, 2, 5, 7])
        kept, rest = data.split(1)
        assert (kept.index, rest.index) == ((0,), (2, 5, 7))

    def test_fingerprint_follows_content_and_order(self, tmp_path: Path) -> None:
        x = np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype(F32)
        a = load_data(save(tmp_path / "a.npz", input=x), PICTURE)
        b = load_data(save(tmp_path / "b.npz", input=x.copy()), PICTURE)
        c = load_data(save(tmp_path / "c.npz", input=x[::-1]), PICTURE)
        assert a.fingerprint() == b.fingerprint()
        assert len({a.fingerprint(), c.fingerprint(), a.take(3).fingerprint()}) == 3

    def test_lossless_integer_casts(self, tmp_path: Path) -> None:
        ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
        data = load_data(save(tmp_path / "d.npz", ids=ids, mask=np.ones((3, 4), np.int32)), TOKENS)
        assert next(data.batches(2))["ids"].dtype == np.int64

    def test_float64_is_narrowed(self, tmp_path: Path) -> None:
        data = load_data(save(tmp_path / "d.npz", input=np.ones((2, 3, 8, 8))), PICTURE)
        assert next(data.batches(2))["input"].dtype == F32

    def test_folder_of_npz(self, tmp_path: Path) -> None:
        for i in range(3):
            save(tmp_path / f"{i}.npz", input=np.full((2, 3, 8, 8), i, F32), labels=np.full(2, i))
        data = load_data(str(tmp_path), PICTURE)
        np.testing.assert_array_equal(np.asarray(data.labels), [0, 0, 1, 1, 2, 2])
        assert len(everything(data, "input")) == 6

    def test_files_of_different_lengths(self, tmp_path: Path) -> None:
        for i, length in enumerate((4, 7, 4)):
            ids = np.full((3, length), i)
            save(tmp_path / f"{i}.npz", ids=ids, mask=np.ones_like(ids), labels=np.full(3, i))
        data = load_data(str(tmp_path), TOKENS)
        assert [b["ids"].shape for b in data.batches(8)] == [(3, 4), (3, 7), (3, 4)]
        np.testing.assert_array_equal(np.asarray(data.labels), [0, 0, 0, 1, 1, 1, 2, 2, 2])
        assert data.fingerprint() != load_data(str(tmp_path), TOKENS, samples=5).fingerprint()
        with pytest.raises(DataError, match="differ in shape; pictures to preprocess need one size"):
            load_data(str(tmp_path), TOKENS, "imagenet")
        with pytest.raises(DataError, match=r"has shape \[3, 7\], the model needs \[samples, 4\]"):
            load_data(str(tmp_path), [InputInfo(i.name, i.dtype, ("N", 4)) for i in TOKENS])


BAD_NPZ = [
    (PICTURE, {"inputs": np.ones((2, 3, 8, 8), F32)}, r"the arrays \['inputs'\].*needs \['input'\].*rename 'inputs' to 'input'"),
    (TOKENS, {"ids": np.ones((2, 4), int)}, r"missing: mask; add what is missing"),
    (PICTURE, {"input": np.ones((2, 3, 8, 9), F32)}, r"'input' has shape \[2, 3, 8, 9\], the model needs \[samples, 3, 8, 8\]"),
    (PICTURE, {"input": np.ones((3, 8, 8), F32)}, r"has shape \[3, 8, 8\]"),
    (PICTURE, {"input": np.ones((2, 8, 8, 3), np.uint8)}, r"is uint8, the model needs float32; name .* --preprocess"),
    (PICTURE, {"input": np.ones((2, 3, 8, 8), np.int64)}, r"is int64, the model needs float32; convert it"),
    (TOKENS, {"ids": np.ones((2, 4)), "mask": np.ones((2, 4), int)}, r"'ids' is float64, the model needs int64"),
    (TOKENS, {"ids": np.ones((2, 4), int), "mask": np.ones((3, 4), int)}, r"different numbers of samples .*'ids': 2, 'mask': 3"),
    (PICTURE, {"input": np.ones((2, 3, 8, 8), F32), "labels": np.ones(3)}, r"different numbers of samples .*'labels': 3"),
    (PICTURE, {"input": np.ones((0, 3, 8, 8), F32)}, r"holds 0 samples and the model takes 1 a run"),
]


@pytest.mark.parametrize(("inputs", "arrays", "message"), BAD_NPZ)
def test_npz_that_does_not_fit(inputs: Any, arrays: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_data(save(tmp_path / "d.npz", **arrays), inputs)


def test_integers_that_do_not_fit(tmp_path: Path) -> None:
    inputs = [InputInfo("ids", np.dtype(np.int32), ("N", "T"))]
    with pytest.raises(DataError, match="is int64, the model needs int32"):
        load_data(save(tmp_path / "d.npz", ids=np.array([[2**40]])), inputs)


@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (-np.inf, "an infinite value")])
def test_not_finite_data_names_array_and_sample(value: float, what: str, tmp_path: Path) -> None:
    x = np.ones((9, 3, 8, 8), F32)
    x[6, 1, 2, 3] = value
    data = load_data(save(tmp_path / "d.npz", input=x), PICTURE)
    with pytest.raises(DataError, match=f"array 'input' holds {what} in sample 6"):
        list(data.batches(4))


def test_too_few_samples(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", input=np.ones((4, 3, 8, 8), F32))
    with pytest.raises(DataError, match="holds 4 samples, 128 are wanted; give more data or --samples 4"):
        load_data(path, PICTURE, samples=128)
    with pytest.raises(DataError, match="holds 4 samples and the model takes 16 a run"):
        load_data(path, [InputInfo("input", np.dtype(F32), (16, 3, 8, 8))])


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data at"):
        load_data(str(tmp_path / "absent.npz"), PICTURE)
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match=r"not a readable \.npz"):
        load_data(str(tmp_path / "text.npz"), PICTURE)
    whole = (tmp_path / "whole.npz", tmp_path / "cut.npz")
    save(whole[0], input=np.ones((4, 3, 8, 8), F32))
    whole[1].write_bytes(whole[0].read_bytes()[:-200])
    with pytest.raises(DataError, match=r"not a readable \.npz"):
        load_data(str(whole[1]), PICTURE)
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(DataError, match=r"one array, not a \.npz"):
        load_data(str(tmp_path / "one.npz"), PICTURE)
    (tmp_path / "data.txt").write_text("")
    with pytest.raises(DataError, match="no known kind of data"):
        load_data(str(tmp_path / "data.txt"), PICTURE)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", input=np.array([{}], object))
    with pytest.raises(DataError, match="holds Python objects"):
        load_data(path, PICTURE)


class TestPictures:
    def test_folder_with_labels(self, tmp_path: Path) -> None:
        folder = picture_folder(tmp_path / "p")
        with (folder / "labels.csv").open("w", newline="") as f:
            csv.writer(f).writerows([["file", "class_index"], ["3.png", 7], ["1.png", 2]])
        data = load_data(str(folder), PICTURE, "minus-one-to-one")
        np.testing.assert_array_equal(np.asarray(data.labels), [7, 2])
        x = np.asarray(Image.open(folder / "3.png"), F32).transpose(2, 0, 1) / 127.5 - 1
        np.testing.assert_allclose(everything(data, "input")[0], x, atol=1e-6)

    def test_fingerprint_sees_files_and_preprocessing(self, tmp_path: Path) -> None:
        folder = picture_folder(tmp_path / "p")
        prints = [load_data(str(folder), PICTURE, p).fingerprint() for p in ("imagenet", "imagenet", "zero-to-one")]
        assert prints[0] == prints[1] != prints[2]

    def test_npz_of_pictures(self, tmp_path: Path) -> None:
        stored = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
        data = load_data(save(tmp_path / "d.npz", input=stored), PICTURE, "imagenet")
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        np.testing.assert_allclose(everything(data, "input"), ((stored / 255 - mean) / std).transpose(0, 3, 1, 2), atol=1e-5)

    def test_gray_npz(self, tmp_path: Path) -> None:
        inputs = [InputInfo("input", np.dtype(F32), ("N", 1, 8, 8))]
        stored = np.random.default_rng(0).integers(0, 256, (4, 8, 8), np.uint8)
        data = load_data(save(tmp_path / "d.npz", input=stored), inputs, "zero-to-one")
        np.testing.assert_allclose(everything(data, "input")[:, 0], stored / 255, atol=1e-6)

    def test_resize_crop_and_layout(self, tmp_path: Path) -> None:
        inputs = [InputInfo("input", np.dtype(F32), ("N", 8, 8, 3))]
        data = load_data(str(picture_folder(tmp_path / "p", side=40)), inputs, "zero-to-one")
        assert everything(data, "input").shape == (5, 8, 8, 3)

    def test_caffe_is_bgr(self, tmp_path: Path) -> None:
        red = np.zeros((1, 8, 8, 3), np.uint8)
        red[..., 0] = 255
        x = everything(load_data(save(tmp_path / "d.npz", input=red), PICTURE, "imagenet-caffe"), "input")
        np.testing.assert_allclose(x[0, :, 0, 0], [-103.939, -116.779, 255 - 123.68], rtol=1e-5)

    def test_toml(self, tmp_path: Path) -> None:
        rule = tmp_path / "p.toml"
        rule.write_text("size = 8\nscale = 1.0\nmean = [1, 2, 3]\nstd = 2.0\nchannels = 'rgb'\nlayout = 'nchw'\n")
        inputs = [InputInfo("input", np.dtype(F32), ("N", 3, "H", "W"))]
        stored = np.full((2, 8, 8, 3), 11, np.uint8)
        x = everything(load_data(save(tmp_path / "d.npz", input=stored), inputs, str(rule)), "input")
        np.testing.assert_allclose(x[0, :, 0, 0], [5, 4.5, 4])

    @pytest.mark.parametrize(
        ("toml", "message"),
        [
            ("men = 1", "unknown key 'men'; did you mean 'mean'"),
            ("std = [0, 1, 1]", "std = .* give 1 or 3 numbers other than 0"),
            ("channels = 'cmyk'", "give rgb, bgr or gray"),
            ("size = [1, 2, 3]", r"give \[height, width\]"),
            ("= 3", "cannot read the preprocessing file"),
        ],
    )
    def test_bad_toml(self, toml: str, message: str, tmp_path: Path) -> None:
        rule = tmp_path / "p.toml"
        rule.write_text(toml)
        with pytest.raises(DataError, match=message):
            load_data(str(picture_folder(tmp_path / "p")), PICTURE, str(rule))

    def test_errors(self, tmp_path: Path) -> None:
        folder = picture_folder(tmp_path / "p")
        with pytest.raises(DataError, match="with --preprocess"):
            load_data(str(folder), PICTURE)
        with pytest.raises(DataError, match="did you mean 'imagenet'"):
            load_data(str(folder), PICTURE, "imagnet")
        with pytest.raises(DataError, match="does not take pictures"):
            load_data(str(folder), TOKENS[:1], "imagenet")
        with pytest.raises(DataError, match="has 2 inputs"):
            load_data(str(folder), TOKENS, "imagenet")
        with pytest.raises(DataError, match="dynamic picture size"):
            load_data(str(folder), [InputInfo("input", np.dtype(F32), ("N", 3, "H", "W"))], "imagenet")
        (folder / "0.png").write_bytes(b"broken")
        with pytest.raises(DataError, match=r"cannot read the picture .*0\.png"):
            list(load_data(str(folder), PICTURE, "imagenet").batches(4))
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match=r"neither \.npz files nor pictures"):
            load_data(str(tmp_path / "empty"), PICTURE)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a,b\n1,2\n", "needs the columns"),
            ("file,label\n0.png,x\n", "not a whole number"),
            ("file,label\n9.png,1\n", r"names 9\.png"),
        ],
    )
    def test_bad_labels(self, text: str, message: str, tmp_path: Path) -> None:
        folder = picture_folder(tmp_path / "p")
        (folder / "labels.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            load_data(str(folder), PICTURE, "imagenet")


GENERATOR = """
import numpy as np
def dicts():
    for i in range(5):
        yield {"ids": np.full((2, 3 + i // 3), i), "mask": np.ones((2, 3 + i // 3), np.int64)}
def arrays():
    while True:
        yield np.ones((3, 8, 8), np.float32)
def broken():
    yield np.ones((3, 8, 8), np.float32)
    raise KeyError("x")
def none():
    return []
"""


class TestGenerators:
    @pytest.fixture
    def file(self, tmp_path: Path) -> str:
        (tmp_path / "gen.py").write_text(GENERATOR)
        return str(tmp_path / "gen.py")

    def test_dicts_of_varying_shape(self, file: str) -> None:
        data = load_data(f"{file}:dicts", TOKENS)
        assert len(data) == 10
        assert [b["ids"].shape for b in data.batches(4)] == [(4, 3), (2, 3), (4, 4)]

    def test_endless_arrays_without_batch_axis(self, file: str) -> None:
        data = load_data(f"{file}:arrays", PICTURE, samples=6)
        assert everything(data, "input").shape == (6, 3, 8, 8)
        assert data.fingerprint() == load_data(f"{file}:arrays", PICTURE, samples=6).fingerprint()

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            ("broken", r"broken failed \(KeyError: 'x'\)"),
            ("none", "gives no samples"),
            ("absent", "defines no function 'absent'"),
        ],
    )
    def test_errors(self, function: str, message: str, file: str) -> None:
        with pytest.raises(DataError, match=message):
            load_data(f"{file}:{function}", PICTURE)

    def test_files_that_do_not_import(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no file"):
            load_data(str(tmp_path / "none.py:f"), PICTURE)
        (tmp_path / "bad.py").write_text("1 / 0")
        with pytest.raises(DataError, match=r"failed while being imported \(ZeroDivisionError"):
            load_data(str(tmp_path / "bad.py:f"), PICTURE)

    def test_bare_arrays_for_two_inputs(self, file: str) -> None:
        with pytest.raises(DataError, match="yields bare arrays"):
            load_data(f"{file}:arrays", TOKENS)


def test_polygraphy_inputs(tmp_path: Path) -> None:
    from polygraphy.json import save_json

    feeds = [{"ids": np.full((1, 4), i), "mask": np.ones((1, 4), np.int64)} for i in range(3)]
    save_json(feeds, str(tmp_path / "in.json"))
    data = load_data(str(tmp_path / "in.json"), TOKENS)
    np.testing.assert_array_equal(everything(data, "ids")[:, 0], [0, 1, 2])
    (tmp_path / "bad.json").write_text("{}x")
    with pytest.raises(DataError, match="not a file of polygraphy inputs"):
        load_data(str(tmp_path / "bad.json"), TOKENS)


def test_random_is_flagged_and_repeatable() -> None:
    data = load_data("random", [*PICTURE, *TOKENS], samples=5, seed=3)
    assert data.random
    assert {n: a.shape for n, a in next(data.batches(5)).items()} == {"input": (5, 3, 8, 8), "ids": (5, 32), "mask": (5, 32)}
    assert data.fingerprint() == load_data("random", [*PICTURE, *TOKENS], samples=5, seed=3).fingerprint()
    assert data.fingerprint() != load_data("random", [*PICTURE, *TOKENS], samples=5, seed=4).fingerprint()


def test_found_beside_the_model(tmp_path: Path) -> None:
    model = tmp_path / "vit.onnx"
    assert find_beside(model) is None
    (tmp_path / "vit.calib").mkdir()
    assert find_beside(model) == str(tmp_path / "vit.calib")
    save(tmp_path / "vit.calib.npz", x=np.zeros(1))
    assert find_beside(str(model)) == str(tmp_path / "vit.calib.npz")


def test_fixed_batch() -> None:
    assert fixed_batch(PICTURE) is None
    assert fixed_batch([InputInfo("x", np.dtype(F32), (4, 3)), InputInfo("t", np.dtype(F32), (4,))]) == 4


def test_every_message_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_data(str(tmp_path / "absent.npz"), PICTURE)
    assert re.search(r"[:;] \w+", str(caught.value))
