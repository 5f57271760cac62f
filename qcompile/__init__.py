"""qcompile: an ONNX graph-transformation compiler pass suite for post-training quantization.

import qcompile
result = qcompile.compile("model.onnx", passes="repq,smooth", target="ort", calib="images.npz")
"""

from __future__ import annotations

import os
import sys

if "numpy" not in sys.modules:  # our products are small: more BLAS threads only wait for each other, at full load
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__version__ = "0.1.0"

from qcompile.compile import Options, Result, compile
from qcompile.ir.model import Model
from qcompile.ir.surgeon import from_gs, surgery, to_gs
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult

__all__ = ["Kind", "Model", "Options", "Pass", "PassContext", "PassResult", "Result", "compile", "from_gs", "surgery", "to_gs"]
