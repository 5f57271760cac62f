"""Functions of integers that the model is given: one row of answers for each integer."""

from __future__ import annotations

import numpy as np

from qcompile.errors import ModelError
from qcompile.passes.lower.integer.context import Scene
from qcompile.passes.lower.integer.emit import INT16, INT64, Fixed
from qcompile.target.integer.plan import Step, counted

_LARGEST = 1 << 22
_FUNCTIONS = {"Sin": np.sin, "Cos": np.cos}


def lookup(scene: Scene, step: Step) -> Fixed:
    """sin(n c) or cos(n c), n one integer a row and c a vector: rows of a table over all n (the embedding of a time step).

    Raises:
        ModelError: the table would hold more than 2^22 entries.
    """
    em, found = scene.em, counted(step.node)
    assert found is not None
    integers, factor = em.read(found[0]), found[1].astype(np.float64)
    reals = np.arange(integers.lo, integers.hi + 1)[:, None] * factor
    if reals.size > _LARGEST:
        raise ModelError(f"{step.node.name}: its table would hold {reals.size} entries; calibrate with smaller integers")
    fmt = scene.stored_format(step.output)
    answers = fmt.code(_FUNCTIONS[step.node.op_type](reals))
    index = em.emit("Sub", [em.cast(integers.value, INT64), em.const(integers.lo, INT64)], INT64)
    rows = em.emit("Gather", [em.const(answers, INT16), index], INT16, {"axis": 0})
    value = em.emit("Squeeze", [rows, em.const(np.asarray([-2]), INT64)], INT16)
    return Fixed(value, np.asarray(fmt.scale), int(answers.min()), int(answers.max()), fmt.zero)
