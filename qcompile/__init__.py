"""qcompile: an ONNX graph-transformation compiler pass suite for post-training quantization.

import qcompile
result = qcompile.compile("model.onnx", passes="repq,smooth", target="ort", calib="images.npz")
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if "numpy" not in sys.modules:  # our products are small: more BLAS threads only wait for each other, at full load
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__version__ = "0.1.0"

if TYPE_CHECKING or os.environ.get("QCOMPILE_WORKER") != "1":  # a builder process needs none of it, and starts 1 s earlier
    from qcompile.ir.model import Model
    from qcompile.ir.surgeon import from_gs, surgery, to_gs
    from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult
    from qcompile.verbs.compile.run import Options, Result, compile

__all__ = ["Kind", "Model", "Options", "Pass", "PassContext", "PassResult", "Result", "compile", "from_gs", "surgery", "to_gs"]
