"""Checks of what the user gives, before any work starts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompile.errors import ModelError, UsageError
from qcompile.ir.model import Model
from qcompile.pipeline.base import matches


def require_sane(samples: int | None, seed: int, patterns: Sequence[str]) -> None:
    """Numbers in range, regular expressions that compile.

    Raises:
        UsageError: naming the option.
    """
    if samples is not None and samples < 1:
        raise UsageError(f"samples is {samples}; give at least 1")
    if seed < 0:
        raise UsageError(f"seed is {seed}; give 0 or more")
    for pattern in patterns:
        try:
            re.compile(pattern[3:] if pattern.startswith("re:") else "")
        except re.error as e:
            raise UsageError(f"pattern {pattern!r} is not a regular expression ({e}); correct it") from e


def require_numbers(model: Model, path: str | Path) -> None:
    """A weight that holds NaN makes every figure meaningless (infinities occur in attention masks)."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and np.isnan(tensor.numpy()).any():
            raise ModelError(f"{path}: the weight {name!r} holds NaN; export the model again")


def require_place(out: Path | None, what: str, taken: Sequence[Path]) -> None:
    """Guard for files that are written beside the output.

    Raises:
        UsageError: `out` is a folder, lies in a missing folder, or would overwrite one of `taken`.
    """
    if out is None:
        return
    if out.is_dir():
        raise UsageError(f"{what} {out} is a folder; name a file")
    if not out.parent.is_dir():
        raise UsageError(f"the folder of {what} {out} does not exist; create it first, or choose another place")
    clash = next((t for t in taken if out.resolve() == t.resolve()), None)
    if clash is not None:
        raise UsageError(f"{what} {out} would overwrite {clash.name}; choose another name")


def unmatched(model: Model, patterns: Sequence[str]) -> list[str]:
    """A note for every --keep-float or --only pattern that names no node of the source model."""
    names = [str(n.name) for n in model.graph]
    missing = [p for p in patterns if not any(matches(p, n) for n in names)]
    return [f"pattern {p!r} matches no node of the model; look at the names with: polygraphy inspect model" for p in missing]
