"""`runnable`: the same function in operators that ONNX Runtime has kernels for."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from qcompile.execute.emulate.bf16 import emulate_bf16
from qcompile.execute.emulate.fp4 import emulate_fp4
from qcompile.execute.emulate.fp8_clip import keep_clips
from qcompile.execute.emulate.mxfp8 import emulate_mxfp8
from qcompile.ir.edit import erase_dead
from qcompile.ir.model import Model

REWRITES: tuple[Callable[[ir.Graph], bool], ...] = (emulate_fp4, emulate_mxfp8, keep_clips, emulate_bf16)


def runnable(model: Model) -> Model:
    """`model` itself if ONNX Runtime can run it, else a copy with its FP4, MXFP8 and bfloat16 parts in standard operators.

    The copy computes the same values bit for bit (only a negative zero may lose its sign; bfloat16 sums inside an operator
    are float32); tensors that were there keep their names.  It shows what a format does to accuracy; its speed says
    nothing about an engine's.
    """
    copy = model.clone()
    changed = [rewrite(copy.graph) for rewrite in REWRITES]
    if not any(changed):
        return model
    erase_dead(copy)
    return copy
