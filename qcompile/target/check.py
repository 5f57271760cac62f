"""The rule checker: will this Q/DQ graph build, and will it run in the precision that it promises?

Every rule has a stable id.  An *error* is refused by the backend or silently runs in float; a *warning* costs speed
or accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from qcompile.errors import UsageError
from qcompile.target.catalog import TARGETS
from qcompile.target.findings import Context, Finding
from qcompile.target.view import GraphView


def check(model: onnx.ModelProto | str | Path | GraphView, target: str, gpus: Sequence[str] = ()) -> list[Finding]:
    """Findings of all rules of `target` on a model, file or view, errors first, in rule order.

    `gpus` (names like "sm89") adds the capability rules.

    Raises:
        UsageError: no such target.
        ModelError: the file is not an ONNX model, or its external data is missing.
    """
    if target not in TARGETS:
        raise UsageError(f"target {target!r} has no rules; use one of {', '.join(TARGETS)}")
    view = model if isinstance(model, GraphView) else GraphView.open(model)
    context = Context(view, TARGETS[target], tuple(gpus))
    found = [finding for rule in TARGETS[target].rules for finding in rule.findings(context)]
    return sorted(found, key=lambda f: f.severity == "warning")
