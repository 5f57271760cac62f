"""Checks of what the user gives, before any work starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompile.errors import ModelError, UsageError
from qcompile.ir.jumps import natures, random_nodes
from qcompile.ir.model import Model
from qcompile.ir.select import require_selector, selected, with_width
from qcompile.report import listed
from qcompile.target.target import Target

_NAMED = 4
_LONGEST_NAME = 255


def require_selectors(selectors: Mapping[str, Sequence[str]]) -> None:
    """Selectors (by option) of a known form.

    Raises:
        UsageError: another form.
    """
    for option, texts in selectors.items():
        for text in texts:
            require_selector(_selector(option, text))


def _selector(option: str, text: str) -> str:
    """The selector in an option's text; --bits has widths behind it."""
    return with_width(text)[0] if option == "bits" else text


def require_numbers(model: Model, path: str | Path) -> None:
    """A weight that holds NaN makes every figure meaningless (infinities occur in attention masks)."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and np.isnan(tensor.numpy()).any():
            raise ModelError(f"{path}: the weight {name!r} holds NaN; export the model again")


def require_batch(batch: int | None, fixed: int | None) -> None:
    """A model whose batch axis is fixed takes no other.

    Raises:
        UsageError: `batch` is another one.
    """
    if batch is not None and fixed is not None and batch != fixed:
        raise UsageError(f"--batch {batch}: the model takes exactly {fixed} samples a run; leave --batch out")


def require_operators(model: Model, target: Target) -> None:
    """A model of operators that the target has.

    Raises:
        ModelError: it holds some that the target has in no form.
    """
    found = [n for n in model.graph.all_nodes() if n.op_type in target.lacks]
    if not found:
        return
    named = listed([f"{n.name} ({n.op_type})" for n in found], _NAMED)
    raise ModelError(
        f"target {target.name} has no operator for {named}; start from the float model, or compile for --target ort,"
        " which keeps them as they are"
    )


def require_place(out: Path | None, what: str, taken: Sequence[Path]) -> None:
    """Guard for files that are written, the output among them.

    Raises:
        UsageError: `out` is a folder, a device or a pipe, lies in a missing folder, has too long a name, or would overwrite one
            of `taken`.
    """
    if out is None:
        return
    try:
        if out.is_dir():
            raise UsageError(f"{what} {out} is a folder; name a file")
        if out.exists() and not out.is_file():
            raise UsageError(f"{what} {out} is a device or a pipe, which would be replaced; name a file")
        if not out.parent.is_dir():
            raise UsageError(f"the folder of {what} {out} does not exist; create it first, or choose another place")
    except OSError as e:
        raise UsageError(f"{what} cannot be {str(out)[:80]!r}: {e.strerror or e}; choose another name") from e
    if len(os.fsencode(out.name)) > _LONGEST_NAME:
        raise UsageError(f"the name of {what} is longer than {_LONGEST_NAME} bytes ({out.name[:40]}...); choose a shorter one")
    clash = next((t for t in taken if same_file(out, t)), None)
    if clash is not None:
        raise UsageError(f"{what} {out} would overwrite {clash.name}; choose another name")


def same_file(a: Path, b: Path) -> bool:
    """Whether both name one file, through links and other hard links too."""
    return a.resolve() == b.resolve() or (a.exists() and b.exists() and os.path.samefile(a, b))


def unmatched(model: Model, selectors: Mapping[str, Sequence[str]]) -> list[str]:
    """A note for every --keep-float, --only, --quantize or --bits selector that chooses no node of the source model."""
    missing = [
        f"--{option.replace('_', '-')} {text}"
        for option, texts in selectors.items()
        for text in texts
        if not selected(_selector(option, text), model.graph)
    ]
    return [f"{text} selects no node of the model; look at the names with: polygraphy inspect model" for text in missing]


def randomness(model: Model) -> list[str]:
    """What is to be said of a model whose outputs differ from run to run; nothing for others."""
    outputs = [str(v.name) for v, n in zip(model.graph.outputs, natures(model.graph), strict=True) if n.random]
    if not outputs:
        return []
    nodes = random_nodes(model.graph)
    which, more = f"{nodes[0].op_type} (node {nodes[0].name!r})", f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
    return [
        f"the model holds {which}{more}: two runs of the float model differ in {', '.join(outputs)}, so no figure is given there;"
        " make the random values an input of the model to compare them"
    ]
