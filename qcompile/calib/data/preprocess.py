"""From pictures to model inputs: resize, crop, scale, normalise, lay out."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qcompile.errors import DataError
from qcompile.ir.model import InputInfo


@dataclass(frozen=True)
class Preprocess:
    """value = (pixel * scale - mean) / std for each channel, after resize and centre crop.

    A picture that already has the model's size is neither resized nor cropped.  `resize` is the length of the
    short side before the crop; 0 means size / 0.875 (torchvision's 256 for 224).  `size` is (height, width) and
    `layout` is found from the model's input shape when not given.
    """

    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channels: Literal["rgb", "bgr", "gray"] | None = None
    layout: Literal["nchw", "nhwc"] | None = None
    size: tuple[int, int] | None = None
    resize: int = 0


_EXPECTED = {
    "mean": "give 1 or 3 numbers",
    "std": "give 1 or 3 numbers other than 0",
    "size": "give [height, width] or one number",
    "scale": "give a number",
    "resize": "give a whole number of pixels",
    "channels": "give rgb, bgr or gray",
    "layout": "give nchw or nhwc",
}

_IMAGENET = Preprocess(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

PRESETS: dict[str, Preprocess] = {
    "imagenet": _IMAGENET,
    "imagenet-caffe": Preprocess(scale=1.0, mean=(103.939, 116.779, 123.68), channels="bgr"),
    "minus-one-to-one": Preprocess(scale=1 / 127.5, mean=(1.0,)),
    "zero-to-one": Preprocess(),
    "raw": Preprocess(scale=1.0),
}


def load_preprocess(spec: str) -> Preprocess:
    """A preset by name, or a TOML file with the fields of `Preprocess`.

    Raises:
        DataError: unknown preset, unreadable file, unknown or ill-typed field.
    """
    if spec in PRESETS:
        return PRESETS[spec]
    path = Path(spec)
    if path.suffix != ".toml":
        near = difflib.get_close_matches(spec, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"unknown preprocessing {spec!r}: {hint}give one of {', '.join(PRESETS)} or a .toml file")
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise DataError(f"cannot read the preprocessing file {spec}: {e}; see the keys of --preprocess in the docs") from e
    return _from_table(table.get("preprocess", table), spec)


def bind(preprocess: Preprocess, info: InputInfo) -> Preprocess:
    """Fill in layout, size and channels from the shape of the model's input.

    Raises:
        DataError: the input does not take pictures, or its size is dynamic and not given.
    """
    if len(info.shape) != 4:
        raise DataError(f"input {info.name!r} of shape {list(info.shape)} does not take pictures; leave --preprocess out")
    layout = preprocess.layout or ("nhwc" if info.shape[3] in (1, 3) and info.shape[1] not in (1, 3) else "nchw")
    dims = info.shape[2:] if layout == "nchw" else info.shape[1:3]
    depth = info.shape[1] if layout == "nchw" else info.shape[3]
    size = preprocess.size or _fixed_size(dims)
    if size is None:
        raise DataError(f"input {info.name!r} has a dynamic picture size {list(dims)}; give size in a .toml file")
    channels = preprocess.channels or ("gray" if depth == 1 else "rgb")
    return replace(preprocess, layout=layout, size=size, channels=channels)


def prepare(picture: Image.Image, bound: Preprocess, dtype: np.dtype[Any]) -> NDArray[Any]:
    """One picture as the model takes it, without the batch axis; `bound` comes from `bind`."""
    assert bound.size is not None
    picture = _fit(picture.convert("L" if bound.channels == "gray" else "RGB"), bound.size, bound.resize)
    x = np.asarray(picture, np.float32)
    x = x[..., None] if x.ndim == 2 else x
    x = x[..., ::-1] if bound.channels == "bgr" else x
    x = (x * np.float32(bound.scale) - np.array(bound.mean, np.float32)) / np.array(bound.std, np.float32)
    x = x.transpose(2, 0, 1) if bound.layout == "nchw" else x
    return np.ascontiguousarray(x, dtype)


def prepare_array(pictures: NDArray[np.uint8], bound: Preprocess, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Stored pictures [N, H, W] or [N, H, W, C] as a batch of the model's input."""
    flat = pictures[..., 0] if pictures.ndim == 4 and pictures.shape[-1] == 1 else pictures
    return np.stack([prepare(Image.fromarray(p), bound, dtype) for p in flat])


def holds_pictures(array: NDArray[Any]) -> bool:
    """Whether an array looks like stored uint8 pictures, [N, H, W] or [N, H, W, 1 | 3 | 4]."""
    return array.dtype == np.uint8 and (array.ndim == 3 or (array.ndim == 4 and array.shape[-1] in (1, 3, 4)))


def _fit(picture: Image.Image, size: tuple[int, int], resize: int) -> Image.Image:
    height, width = size
    if picture.size == (width, height):
        return picture
    short = resize or round(min(size) / 0.875)
    ratio = max(short / min(picture.size), height / picture.height, width / picture.width)
    scaled = (max(width, round(picture.width * ratio)), max(height, round(picture.height * ratio)))
    picture = picture.resize(scaled, Image.Resampling.BILINEAR)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def _fixed_size(dims: tuple[int | str | None, ...]) -> tuple[int, int] | None:
    height, width = dims
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _from_table(table: dict[str, Any], path: str) -> Preprocess:
    known = {f.name for f in fields(Preprocess)}
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise DataError(f"{path}: unknown key {key!r}; {f'did you mean {near[0]!r}?' if near else f'known: {sorted(known)}'}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    for key in ("mean", "std"):
        if isinstance(values.get(key), int | float):
            values[key] = (values[key],)
    if isinstance(values.get("size"), int):
        values["size"] = (values["size"], values["size"])
    _require_values(values, path)
    return Preprocess(**values)


def _require_values(values: dict[str, Any], path: str) -> None:
    rules = {"mean": _numbers((1, 3)), "std": _numbers((1, 3)), "size": _numbers((2,), whole=True)}
    rules |= {"scale": _numbers(()), "resize": _numbers((), whole=True)}
    rules |= {"channels": lambda v: v in ("rgb", "bgr", "gray"), "layout": lambda v: v in ("nchw", "nhwc")}
    for key, value in values.items():
        if not rules[key](value) or (key == "std" and not all(value)):
            raise DataError(f"{path}: {key} = {value!r} is no good; {_EXPECTED[key]}")


def _numbers(lengths: tuple[int, ...], whole: bool = False) -> Callable[[Any], bool]:
    """A test for a number, or for a tuple of numbers of one of the lengths."""
    kind = int if whole else int | float

    def holds(value: Any) -> bool:
        if not lengths:
            return isinstance(value, kind)
        return isinstance(value, tuple) and len(value) in lengths and all(isinstance(v, kind) for v in value)

    return holds
