"""Optimization profiles: the smallest, most usual and largest shape of each dynamic input."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from onnx import ModelProto, ValueInfoProto

from qcompile.errors import UsageError

_Span = tuple[int, ...]
SHAPES_KEY = "qcompile.shapes"
BATCH = (1, 8, 32)
OTHER = (8, 32, 128)
_OUTSIDE = (
    "axis {1} of {0!r} runs from {2} to {3} in the profile, but was calibrated at {4}: inputs of other sizes may exceed the"
    " ranges; calibrate at the largest size, or change the profile"
)
FORM = "write input:MINxDIMS,OPTxDIMS,MAXxDIMS, e.g. x:1x3x224x224,8x3x224x224,32x3x224x224"


@dataclass(frozen=True)
class ShapeRange:
    """The shapes an engine accepts for one input; kernels are chosen for `opt`."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """Shape ranges by input name; `source` says where they come from."""

    shapes: Mapping[str, ShapeRange]
    source: str = "given"

    def to_json(self) -> dict[str, list[list[int]]]:
        """{input: [min, opt, max]}."""
        return {name: [list(r.min), list(r.opt), list(r.max)] for name, r in self.shapes.items()}

    def optimum(self) -> dict[str, tuple[int, ...]]:
        """{input: opt}."""
        return {name: r.opt for name, r in self.shapes.items()}


def parse_profile(text: str) -> Profile:
    """`x:1x3x32x32,8x3x32x32,32x3x32x32` (min, opt, max); several inputs are separated by `;`.  One shape means all three.

    Raises:
        UsageError: the text does not have that form, or min <= opt <= max does not hold.
    """
    return Profile(dict(_parse_input(part) for part in text.split(";") if part.strip()))


def _parse_input(part: str) -> tuple[str, ShapeRange]:
    name, _, shapes = part.strip().rpartition(":")
    try:
        dims = [tuple(int(d) for d in shape.split("x")) for shape in shapes.split(",")]
    except ValueError:
        raise UsageError(f"profile {part.strip()!r} is not a list of shapes; {FORM}") from None
    if not name or len(dims) not in (1, 3):
        raise UsageError(f"profile {part.strip()!r} needs a name and three shapes; {FORM}")
    shape_range = ShapeRange(dims[0], dims[len(dims) // 2], dims[-1])
    _check_order(name, shape_range)
    return name, shape_range


def _check_order(name: str, r: ShapeRange) -> None:
    if not len(r.min) == len(r.opt) == len(r.max):
        raise UsageError(f"profile of {name!r}: min, opt and max have different ranks; {FORM}")
    if any(not 0 < lo <= opt <= hi for lo, opt, hi in zip(r.min, r.opt, r.max, strict=True)):
        raise UsageError(f"profile of {name!r}: needs 0 < min <= opt <= max on every axis; {FORM}")


def default_profile(model: ModelProto) -> Profile | None:
    """A profile for the dynamic inputs of `model`; None when all shapes are fixed.

    Axis 0 gets 1/8/32.  Another dynamic axis gets 8/32/128, moved to include the calibration shape that the model
    records as `qcompile.shapes` (JSON, {input: {"min": dims, "max": dims}}), whose value becomes the optimum.  An axis that was
    as long as two others together, or is named so, as the mask of a decoder with a cache, is so at all three points.
    """
    recorded = _recorded(model)
    dynamic = list(dynamic_inputs(model))
    if not dynamic:
        return None
    smallest = _recorded(model, "min")
    guessed = {v.name: _guess(v, smallest.get(v.name, []), recorded.get(v.name, [])) for v in dynamic}
    shapes = _with_sums(dynamic, guessed, smallest, recorded)
    source = "calibration shapes" if recorded else "guessed from the axes (batch 1/8/32, others 8/32/128)"
    return Profile(shapes, source)


def dynamic_inputs(model: ModelProto) -> Iterable[ValueInfoProto]:
    """Graph inputs (not initializers) with an axis whose size is not fixed."""
    initialized = {t.name for t in model.graph.initializer}
    inputs = (v for v in model.graph.input if v.name not in initialized)
    return [v for v in inputs if any(d.dim_value <= 0 for d in v.type.tensor_type.shape.dim)]


def _guess(value: ValueInfoProto, smallest: Sequence[int], largest: Sequence[int]) -> ShapeRange:
    dims = value.type.tensor_type.shape.dim
    seen = largest if len(largest) == len(dims) else [0] * len(dims)
    least = smallest if len(smallest) == len(dims) else seen
    axes = [_axis_range(i, d.dim_value, int(a), int(b)) for i, (d, a, b) in enumerate(zip(dims, least, seen, strict=True))]
    return ShapeRange(*(tuple(a[k] for a in axes) for k in range(3)))


def _with_sums(
    inputs: Sequence[ValueInfoProto],
    shapes: Mapping[str, ShapeRange],
    smallest: Mapping[str, Sequence[int]],
    largest: Mapping[str, Sequence[int]],
) -> dict[str, ShapeRange]:
    """The guesses, with axes that are sums of two others set to their sums."""
    axes: dict[str, tuple[_Span, _Span]] = {}
    for value in inputs:
        for k, dim in list(enumerate(value.type.tensor_type.shape.dim))[1:]:
            if dim.dim_value <= 0 and k < min(len(smallest.get(value.name, ())), len(largest.get(value.name, ()))):
                r = shapes[value.name]
                seen = (smallest[value.name][k], largest[value.name][k])
                axes.setdefault(dim.dim_param or f"{value.name}.{k}", (seen, (r.min[k], r.opt[k], r.max[k])))
    sums = {name: added for name, (seen, _) in axes.items() if (added := _sum(name, seen, axes)) is not None}
    return {v.name: _replaced(v, shapes[v.name], sums) for v in inputs}


def _sum(name: str, seen: _Span, axes: Mapping[str, tuple[_Span, _Span]]) -> _Span | None:
    """The range of the two other axes that `name` spells, or that were as long together at both ends of calibration."""
    spelled = tuple(part.strip() for part in name.split("+"))
    for a, b in combinations([n for n in axes if n != name], 2):
        (seen_a, range_a), (seen_b, range_b) = axes[a], axes[b]
        pairs = (zip(seen_a, seen_b, strict=True), zip(seen_a, reversed(seen_b), strict=True))  # a long prompt has no past
        together = any(sorted(x + y for x, y in pair) == sorted(seen) for pair in pairs)
        if {a, b} == set(spelled) or (together and max(seen_a) and max(seen_b)):
            return tuple(x + y for x, y in zip(range_a, range_b, strict=True))
    return None


def _replaced(value: ValueInfoProto, r: ShapeRange, sums: Mapping[str, _Span]) -> ShapeRange:
    names = [d.dim_param or f"{value.name}.{k}" for k, d in enumerate(value.type.tensor_type.shape.dim)]

    def end(i: int, dims: _Span) -> _Span:
        return tuple(sums[n][i] if k and n in sums else d for k, (n, d) in enumerate(zip(names, dims, strict=True)))

    return ShapeRange(end(0, r.min), end(1, r.opt), end(2, r.max))


def _axis_range(axis: int, size: int, smallest: int, largest: int) -> tuple[int, int, int]:
    if size > 0:
        return size, size, size
    if axis == 0:
        return BATCH
    lo, opt, hi = OTHER
    return (min(lo, max(1, smallest)), largest, max(hi, largest)) if largest > 0 else (lo, opt, hi)


def _recorded(model: ModelProto, end: str = "max") -> Mapping[str, Sequence[int]]:
    """The largest dims (or the "min") of each input over the calibration samples."""
    text = next((p.value for p in model.metadata_props if p.key == SHAPES_KEY), "{}")
    try:
        found: Any = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return {name: _dims(seen, end) for name, seen in found.items()} if isinstance(found, dict) else {}


def _dims(seen: Any, end: str) -> Sequence[int]:
    """The dims of one sample as older models record them, or one end of {"min": dims, "max": dims}."""
    dims: Any = seen.get(end, []) if isinstance(seen, dict) else seen
    return dims if isinstance(dims, list) else []


def outside_calibration(model: ModelProto, profile: Profile) -> list[str]:
    """Where `profile` leaves the shapes that the model was calibrated at (recorded as `qcompile.shapes`), one line an axis.

    Axis 0 is the batch, which moves no range.  On another axis, larger sizes than calibration saw may exceed its ranges, and
    a profile of smaller sizes only was never seen at all.
    """
    smallest, largest = _recorded(model, "min"), _recorded(model)
    lines = (_outside(name, r, smallest.get(name, []), largest.get(name, [])) for name, r in profile.shapes.items())
    return [line for found in lines for line in found]


def _outside(name: str, r: ShapeRange, smallest: Sequence[int], largest: Sequence[int]) -> list[str]:
    if not len(smallest) == len(largest) == len(r.min):
        return []
    axes = [(i, r.min[i], r.max[i], int(smallest[i]), int(largest[i])) for i in range(1, len(largest))]
    return [
        _OUTSIDE.format(name, i, lo, hi, top if low == top else f"{low} to {top}")
        for i, lo, hi, low, top in axes
        if hi > top or hi < low
    ]


def check_profile(model: ModelProto, profile: Profile) -> None:
    """Refuse a profile that does not fit the inputs of `model`.

    Raises:
        UsageError: an unknown name, a rank or a fixed axis that differs, or a dynamic input without shapes.
    """
    inputs = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    for name, shape_range in profile.shapes.items():
        if name not in inputs:
            raise UsageError(f"profile names {name!r}, which is not an input; the inputs are {', '.join(sorted(inputs))}")
        for shape in (shape_range.min, shape_range.opt, shape_range.max):
            _check_fits(name, inputs[name], shape)
    missing = [v.name for v in dynamic_inputs(model) if v.name not in profile.shapes]
    if missing:
        raise UsageError(f"the profile has no shapes for the dynamic input {missing[0]!r}; add it after a semicolon ({FORM})")


def _check_fits(name: str, dims: Sequence[int], shape: Sequence[int]) -> None:
    if len(dims) != len(shape) or any(d not in (0, -1, s) for d, s in zip(dims, shape, strict=False)):
        have = "x".join(str(d) if d > 0 else "?" for d in dims)
        raise UsageError(f"profile of {name!r}: {'x'.join(map(str, shape))} does not fit the model's {have}; correct the profile")
