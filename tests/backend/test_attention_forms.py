"""Attention of well-known networks as the RTX builder takes it: which blocks are one kernel, and what is said of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from qcompile.backend.audit import AuditResult, audit
from qcompile.backend.profile import parse_profile
from qcompile.ir.model import Model
from tests.passes.running import context, pipeline
from tests.writing import Writing

SAMPLES = 4


@dataclass
class Form(Writing):
    """One block: `tokens` queries of `heads` x `size`; `context` keys of another input; Swin's 5-D masks; VAE's pictures."""

    tokens: int
    heads: int
    size: int
    context: int = 0
    windows: int = 0
    picture: bool = False

    def linear(self, x: str, name: str, rows: int) -> str:
        rng = np.random.default_rng(len(self.nodes))
        width = self.heads * self.size
        weight = (rng.standard_normal((rows, width)) / rows**0.5).astype(np.float32)
        y = self.op("MatMul", [x, self.const(f"w_{name}", weight)], f"{name}_m")
        return self.op("Add", [y, self.const(f"b_{name}", 0.1 * rng.standard_normal(width).astype(np.float32))], name)

    def heads_of(self, x: str, name: str, perm: list[int]) -> str:
        shape = self.const(f"{name}_shape", np.array([0, -1, self.heads, self.size]))
        return self.op("Transpose", [self.op("Reshape", [x, shape], f"{name}_r")], f"{name}_h", perm=perm)  # fmt: skip

    def bias(self, scores: str) -> str:
        """A relative bias, and the mask of shifted windows between two Reshapes."""
        if not self.windows:
            return scores
        rng = np.random.default_rng(9)
        table = rng.standard_normal((1, self.heads, self.tokens, self.tokens)).astype(np.float32)
        mask = np.where(rng.random((1, self.windows, 1, self.tokens, self.tokens)) < 0.2, -100, 0).astype(np.float32)
        wide = self.const("wide", np.array([-1, self.windows, self.heads, self.tokens, self.tokens]))
        flat = self.const("flat", np.array([-1, self.heads, self.tokens, self.tokens]))
        s = self.op("Add", [scores, self.const("table", table)], "biased")
        s = self.op("Add", [self.op("Reshape", [s, wide], "s5"), self.const("mask", mask)], "masked5")
        return self.op("Reshape", [s, flat], "masked")

    def model(self) -> tuple[Model, dict[str, Any]]:
        width, rng = self.heads * self.size, np.random.default_rng(1)
        batch = SAMPLES * (self.windows or 1)
        shapes: dict[str, list[Any]] = {"x": ["N", self.tokens, width]}
        if self.picture:
            side = int(self.tokens**0.5)
            shapes["x"] = ["N", width, side, side]
        if self.context:
            shapes["c"] = ["N", self.context, width]
        x = "x"
        if self.picture:
            x = self.op("Reshape", [x, self.const("rows", np.array([0, width, -1]))], "flat_x")
            x = self.op("Transpose", [x], "tokens_x", perm=[0, 2, 1])
        x = self.op("LayerNormalization", [x, self.const("g", np.ones(width, np.float32))], "norm", axis=-1)
        c = "c" if self.context else x
        q, k, v = (self.linear(s, n, width) for s, n in ((x, "q"), (c, "k"), (c, "v")))
        q, k, v = (self.heads_of(s, n, p) for s, n, p in ((q, "q", [0, 2, 1, 3]), (k, "k", [0, 2, 3, 1]), (v, "v", [0, 2, 1, 3])))
        s = self.op("Mul", [self.op("MatMul", [q, k], "s"), self.const("scale", np.float32(self.size**-0.5))], "scaled")
        p = self.op("Softmax", [self.bias(s)], "p", axis=-1)
        o = self.op("Transpose", [self.op("MatMul", [p, v], "o")], "o_t", perm=[0, 2, 1, 3])
        o = self.op("Reshape", [o, self.const("joined", np.array([0, -1, width]))], "o_r")
        y = self.op("Add", [self.linear(o, "out", width), x], "sum")
        y = self.linear(self.op("Relu", [y], "relu"), "y", width)
        ends = [helper.make_tensor_value_info(n, T.FLOAT, d) for n, d in shapes.items()]
        made = helper.make_tensor_value_info(y, T.FLOAT, ["N", None, width])
        graph = helper.make_graph(self.nodes, "g", ends, [made], [numpy_helper.from_array(a, n) for n, a in self.stored.items()])
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        feeds = {n: rng.standard_normal((batch, *d[1:])).astype(np.float32) for n, d in shapes.items()}
        return Model.from_proto(proto), feeds


def built(form: Form, folder: Path, scheme: str = "w8a8") -> tuple[AuditResult, list[str]]:
    """The audit, and what annotate said of the block's first product."""
    pytest.importorskip("tensorrt_rtx")
    model, feeds = form.model()
    made, reports = pipeline("annotate", model, feeds, context("rtx", scheme))
    said = [r.reason for report in reports for r in report.remarks if r.node == "n_s" and r.kind in ("missed", "note")]
    profile = f"x:{form.windows}x49x128,8x49x128,32x49x128" if form.windows else ""  # whole pictures
    return audit(made.save(folder / "m.onnx"), "sm89", profile=parse_profile(profile) if profile else None), said


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("form", "fused", "said"),
    [
        pytest.param(Form(49, 4, 32, windows=4), 1, "", id="swin"),
        pytest.param(Form(256, 4, 36), 1, "", id="mobilevit, padded"),
        pytest.param(Form(256, 4, 40), 1, "", id="unet self, padded"),
        pytest.param(Form(1024, 2, 64), 1, "up to 1024 keys", id="unet keys"),
        pytest.param(Form(1024, 2, 64, context=77), 1, "", id="unet cross"),
        pytest.param(Form(256, 1, 512, picture=True), 0, "head size is 512", id="vae"),
    ],
)
def test_int8_where_a_kernel_takes_it_else_float16(form: Form, fused: int, said: str, tmp_path: Path) -> None:
    result, remarks = built(form, tmp_path)
    assert result.attention == (1, fused) and result.share == 1.0
    assert len(remarks) == bool(said) and all(said in text for text in remarks)
    quantized = {n.reads for n in result.nodes if n.item.kind == "bmm"}
    assert ("int8" in quantized) is (not said or not fused)
