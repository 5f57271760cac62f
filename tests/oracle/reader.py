"""A reader of the exported JSON in pure Python: no numpy, no ONNX, only what the document says.

A tensor is (shape, flat list of integers in row-major order).  Everything is Python integers, so nothing can overflow here; the
document's consumer relies on the proof for that.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Tensor = tuple[tuple[int, ...], list[int]]
Layer = dict[str, Any]
CODES = {
    "int8": "b",
    "uint8": "B",
    "int16": "h",
    "uint16": "H",
    "int32": "i",
    "uint32": "I",
    "int64": "q",
    "uint64": "Q",
    "bool": "?",
}
ONE: Tensor = ((), [0])


def unpack(stored: dict[str, Any]) -> Tensor:
    shape, data = tuple(stored["shape"]), base64.b64decode(stored["data"])
    return shape, [int(v) for v in struct.unpack(f"<{math.prod(shape)}{CODES[stored['dtype']]}", data)]


def run(document: dict[str, Any], codes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Codes of the outputs for codes of the inputs, by tensor name."""
    values = {name: unpack(t) for name, t in document["constants"].items()} | codes
    for layer in document["layers"]:
        inputs = [values[name] if name else None for name in layer["inputs"]]
        made = KERNELS[layer["op"]](layer, *inputs)
        values |= zip(layer["outputs"], made if isinstance(made, list) else [made], strict=False)
    return {o["tensor"]: values[o["tensor"]] for o in document["outputs"]}


def load(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text())
    assert (document["format"], document["version"]) == ("qcompile-integer", 1)
    assert document["rounding"] == "half_up"
    return document


# ---- shapes -------------------------------------------------------------------------------------------------------


def strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[i + 1 :]) for i in range(len(shape))]


def places(shape: tuple[int, ...]) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*(range(n) for n in shape))


def broadcast(*tensors: Tensor) -> tuple[tuple[int, ...], list[list[int]]]:
    """The joint shape, and each tensor's elements repeated to fill it."""
    rank = max(len(s) for s, _ in tensors)
    shape = tuple(max(((1,) * (rank - len(s)) + s)[i] for s, _ in tensors) for i in range(rank))
    return shape, [_repeated(t, shape) for t in tensors]


def _repeated(t: Tensor, shape: tuple[int, ...]) -> list[int]:
    if t[0] == shape:
        return t[1]
    padded = (1,) * (len(shape) - len(t[0])) + t[0]
    steps = [0 if n == 1 else s for n, s in zip(padded, strides(padded), strict=True)]
    return [t[1][sum(i * s for i, s in zip(at, steps, strict=True))] for at in places(shape)]


def elementwise(function: Callable[..., int], *tensors: Tensor) -> Tensor:
    shape, columns = broadcast(*tensors)
    return shape, [function(*row) for row in zip(*columns, strict=True)]


def parameter(layer: Layer, role: str, default: int = 0) -> Tensor:
    return unpack(layer[role]) if role in layer else ((), [default])


# ---- layers of their own ------------------------------------------------------------------------------------------


def requantize(layer: Layer, x: Tensor) -> Tensor:
    centred = elementwise(lambda a, z: a - z, x, parameter(layer, "x_zero_point"))
    product = elementwise(lambda a, m: a * m, centred, parameter(layer, "m", 1))
    summed = elementwise(lambda a, o, r: a + o + r, product, parameter(layer, "offset"), parameter(layer, "rounding"))
    shifted = elementwise(lambda a, e: a >> e, summed, parameter(layer, "e"))
    moved = elementwise(lambda a, z: a + z, shifted, parameter(layer, "zero_point"))
    if "low" not in layer:
        return moved
    return elementwise(lambda a, low, high: min(max(a, low), high), moved, parameter(layer, "low"), parameter(layer, "high"))


def table(layer: Layer, x: Tensor) -> Tensor:
    values, offset = parameter(layer, "values")[1], parameter(layer, "offset")[1][0]
    return x[0], [values[v + offset] for v in x[1]]


def conv(layer: Layer, x: Tensor) -> Tensor:
    (n, channels, h, w), (m, per_group, kh, kw) = x[0], tuple(layer["weight"]["shape"])
    weight, bias = parameter(layer, "weight")[1], parameter(layer, "bias")
    xz, wz = parameter(layer, "x_zero_point")[1][0], parameter(layer, "w_zero_point")[1]
    sh, sw = layer.get("strides", [1, 1])
    dh, dw = layer.get("dilations", [1, 1])
    top, left, bottom, right = layer.get("pads", [0] * 4)
    groups = layer.get("group", 1)
    rows, columns = (h + top + bottom - dh * (kh - 1) - 1) // sh + 1, (w + left + right - dw * (kw - 1) - 1) // sw + 1
    out = []
    for b, o, r, c in places((n, m, rows, columns)):
        first, z, total = o // (m // groups) * per_group, wz[o % len(wz)], 0
        for i, p, q in places((per_group, kh, kw)):
            y, z_x = r * sh - top + p * dh, c * sw - left + q * dw
            if 0 <= y < h and 0 <= z_x < w:
                code = x[1][((b * channels + first + i) * h + y) * w + z_x]
                total += (code - xz) * (weight[((o * per_group + i) * kh + p) * kw + q] - z)
        out.append(total)
    return elementwise(lambda a, b: a + b, ((n, m, rows, columns), out), bias)


def matmul(layer: Layer, x: Tensor) -> Tensor:
    made = matmulinteger(layer, x, parameter(layer, "weight"), parameter(layer, "x_zero_point"), parameter(layer, "w_zero_point"))
    return elementwise(lambda a, b: a + b, made, parameter(layer, "bias"))


def matmulinteger(_: Layer, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    left = elementwise(lambda v, z: v - z, a, a_zero or ONE)
    right = elementwise(lambda v, z: v - z, b, b_zero or ONE)
    (m, k), n = a[0][-2:], b[0][-1]
    batch, (starts_a, starts_b) = broadcast(_starts(a[0]), _starts(b[0]))
    out = []
    for p, q in zip(starts_a, starts_b, strict=True):
        for i, j in places((m, n)):
            out.append(sum(left[1][p + i * k + t] * right[1][q + t * n + j] for t in range(k)))
    return (*batch, m, n), out


def _starts(shape: tuple[int, ...]) -> Tensor:
    """Where each matrix of a stack begins."""
    size = shape[-1] * shape[-2]
    return shape[:-2], [i * size for i in range(math.prod(shape[:-2]))]


# ---- ONNX operators -----------------------------------------------------------------------------------------------


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def cast(layer: Layer, x: Tensor) -> Tensor:
    if layer["to"] == "bool":
        return x[0], [int(v != 0) for v in x[1]]
    bits, signed = struct.calcsize(f"<{CODES[layer['to']]}") * 8, not layer["to"].startswith("u")
    wrapped = (v % (1 << bits) for v in x[1])
    return x[0], [v - (1 << bits) if signed and v >> (bits - 1) else v for v in wrapped]


def bitshift(layer: Layer, a: Tensor, bits: Tensor) -> Tensor:
    return elementwise((lambda v, s: v >> s) if layer["direction"] == "RIGHT" else (lambda v, s: v << s), a, bits)


def clip(_: Layer, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    x = x if low is None else elementwise(max, x, low)
    return x if high is None else elementwise(min, x, high)


def reduced(function: Callable[[list[int]], int]) -> Callable[..., Tensor]:
    def kernel(layer: Layer, x: Tensor, axes: Tensor | None = None) -> Tensor:
        rank = len(x[0])
        over = {a % rank for a in axes[1]} if axes is not None else set(range(rank))
        groups: dict[tuple[int, ...], list[int]] = {}
        for at, v in zip(places(x[0]), x[1], strict=True):
            groups.setdefault(tuple(0 if i in over else p for i, p in enumerate(at)), []).append(v)
        kept = tuple(1 if i in over else n for i, n in enumerate(x[0]))
        shape = kept if layer.get("keepdims", 1) else tuple(n for i, n in enumerate(x[0]) if i not in over)
        return shape, [function(groups[at]) for at in places(kept)]

    return kernel


def reshape(_: Layer, x: Tensor, target: Tensor) -> Tensor:
    shape = [x[0][i] if n == 0 else n for i, n in enumerate(target[1])]
    missing = len(x[1]) // math.prod(n for n in shape if n != -1)
    return tuple(missing if n == -1 else n for n in shape), x[1]


def flatten(layer: Layer, x: Tensor) -> Tensor:
    axis = layer.get("axis", 1)
    return (math.prod(x[0][:axis]), math.prod(x[0][axis:])), x[1]


def transpose(layer: Layer, x: Tensor) -> Tensor:
    perm = layer.get("perm") or list(reversed(range(len(x[0]))))
    shape, steps = tuple(x[0][p] for p in perm), strides(x[0])
    return shape, [x[1][sum(i * steps[p] for i, p in zip(at, perm, strict=True))] for at in places(shape)]


def concat(layer: Layer, *parts: Tensor) -> Tensor:
    axis = layer["axis"] % len(parts[0][0])
    outer, out = math.prod(parts[0][0][:axis]), []
    sizes = [math.prod(s[axis:]) for s, _ in parts]
    for i in range(outer):
        for (_, flat), size in zip(parts, sizes, strict=True):
            out += flat[i * size : (i + 1) * size]
    shape = list(parts[0][0])
    shape[axis] = sum(s[axis] for s, _ in parts)
    return tuple(shape), out


def maxpool(layer: Layer, x: Tensor) -> Tensor:
    (n, c, h, w), (kh, kw) = x[0], layer["kernel_shape"]
    (sh, sw), (top, left, bottom, right) = layer.get("strides", [1, 1]), layer.get("pads", [0] * 4)
    shape = (n, c, (h + top + bottom - kh) // sh + 1, (w + left + right - kw) // sw + 1)
    out = []
    for b, k, r, q in places(shape):
        spots = ((r * sh - top + i, q * sw - left + j) for i, j in places((kh, kw)))
        out.append(max(x[1][((b * c + k) * h + y) * w + z] for y, z in spots if 0 <= y < h and 0 <= z < w))
    return shape, out


def gather(layer: Layer, x: Tensor, index: Tensor) -> Tensor:
    axis = layer.get("axis", 0)
    inner, outer, length = math.prod(x[0][axis + 1 :]), math.prod(x[0][:axis]), x[0][axis]
    out = []
    for o, i in itertools.product(range(outer), index[1]):
        start = (o * length + i % length) * inner
        out += x[1][start : start + inner]
    return (*x[0][:axis], *index[0], *x[0][axis + 1 :]), out


def _binary(function: Callable[[int, int], int]) -> Callable[..., Tensor]:
    return lambda _, *tensors: elementwise(function, *tensors)


def _many(function: Callable[..., int]) -> Callable[..., Tensor]:
    return lambda _, *tensors: elementwise(function, *tensors)


KERNELS: dict[str, Callable[..., Any]] = {
    "requantize": requantize,
    "table": table,
    "conv": conv,
    "matmul": matmul,
    "matmulinteger": matmulinteger,
    "add": _binary(lambda a, b: a + b),
    "sub": _binary(lambda a, b: a - b),
    "mul": _binary(lambda a, b: a * b),
    "div": _binary(truncated),
    "max": _many(max),
    "min": _many(min),
    "greater": _binary(lambda a, b: int(a > b)),
    "greaterorequal": _binary(lambda a, b: int(a >= b)),
    "less": _binary(lambda a, b: int(a < b)),
    "where": lambda _, *t: elementwise(lambda c, a, b: a if c else b, *t),
    "cast": cast,
    "bitshift": bitshift,
    "clip": clip,
    "reducesum": reduced(sum),
    "reducemax": reduced(max),
    "reshape": reshape,
    "flatten": flatten,
    "transpose": transpose,
    "concat": concat,
    "maxpool": maxpool,
    "gather": gather,
}
