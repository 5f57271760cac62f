"""Golden cases: a tiny graph, a pass string, and what comes out as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from onnx import helper

from qcompile.ir.model import Model
from qcompile.ir.text import print_model
from qcompile.pipeline import registry
from tests.passes.models import Feeds, biased, built, joined, stem
from tests.passes.running import context, run_passes

FOLDER = Path(__file__).parents[1] / "goldens"
node = helper.make_node


@dataclass(frozen=True)
class Golden:
    """`passes` run exactly on `model`; the file is goldens/`name`.txt."""

    name: str
    passes: str
    model: Callable[[], Model]
    target: str = "trt"
    scheme: str = "w8a8"
    shape: tuple[int, ...] = field(default=(4, 5, 16))

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.txt"

    def text(self) -> str:
        """The graph before and after, and the remarks."""
        rng = np.random.default_rng(0)
        arrays: Feeds = {"x": rng.standard_normal(self.shape).astype(np.float32)}
        before = self.model()
        after, reports = run_passes(before, registry.parse(self.passes), arrays, context(self.target, self.scheme))
        remarks = "".join(f"{r.kind} {r.pass_name} {r.node or '-'}: {r.reason}\n" for x in reports for r in x.remarks)
        head = f"passes: {self.passes}\ntarget: {self.target} {self.scheme}\n"
        return f"{head}\n{print_model(before)}\n{print_model(after)}\n{remarks}"


def block() -> Model:
    """LayerNormalization -> packed qkv -> attention of one head -> projection -> residual -> norm -> MLP with GELU."""
    rng = np.random.default_rng(0)
    shapes = {"g1": 16, "b1": 16, "g2": 16, "b2": 16, "wqkv": (16, 48), "bqkv": 48, "wo": (16, 16), "bo": 16}
    shapes |= {"w1": (16, 32), "c1": 32, "w2": (32, 16), "c2": 16}
    constants = {n: (rng.standard_normal(s) * 0.3).astype(np.float32) for n, s in shapes.items()}
    constants |= {
        "heads": np.array([0, 0, 3, 2, 8]),
        "merged": np.array([0, 0, 16]),
        "axis0": np.array([0]),
        "root": np.float32(8**-0.5),
    }
    constants |= {"r2": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5), "thirds": np.array([1, 1, 1])}
    nodes = [
        node("LayerNormalization", ["x", "g1", "b1"], ["n1"], name="norm1"),
        node("MatMul", ["n1", "wqkv"], ["m0"], name="qkv"),
        node("Add", ["m0", "bqkv"], ["a0"], name="qkv_bias"),
        node("Reshape", ["a0", "heads"], ["h0"], name="heads"),
        node("Transpose", ["h0"], ["t0"], name="to_heads", perm=[2, 0, 3, 1, 4]),
        node("Split", ["t0", "thirds"], ["q1", "k1", "v1"], name="split", axis=0),
        node("Squeeze", ["q1", "axis0"], ["q"], name="q"),
        node("Squeeze", ["k1", "axis0"], ["k"], name="k"),
        node("Squeeze", ["v1", "axis0"], ["v"], name="v"),
        node("Mul", ["q", "root"], ["qs"], name="scale"),
        node("Transpose", ["k"], ["kt"], name="k_t", perm=[0, 1, 3, 2]),
        node("MatMul", ["qs", "kt"], ["s"], name="scores"),
        node("Softmax", ["s"], ["p"], name="softmax", axis=-1),
        node("MatMul", ["p", "v"], ["o"], name="pv"),
        node("Transpose", ["o"], ["ot"], name="from_heads", perm=[0, 2, 1, 3]),
        node("Reshape", ["ot", "merged"], ["om"], name="merge"),
        node("MatMul", ["om", "wo"], ["m1"], name="proj"),
        node("Add", ["m1", "bo"], ["a1"], name="proj_bias"),
        node("Add", ["x", "a1"], ["r1"], name="residual1"),
        node("LayerNormalization", ["r1", "g2", "b2"], ["n2"], name="norm2"),
        node("MatMul", ["n2", "w1"], ["m2"], name="fc1"),
        node("Add", ["m2", "c1"], ["a2"], name="fc1_bias"),
        node("Div", ["a2", "r2"], ["d"], name="gelu_div"),
        node("Erf", ["d"], ["e"], name="gelu_erf"),
        node("Add", ["e", "one"], ["f"], name="gelu_add"),
        node("Mul", ["half", "f"], ["h"], name="gelu_half"),
        node("Mul", ["a2", "h"], ["u"], name="gelu"),
        node("MatMul", ["u", "w2"], ["m3"], name="fc2"),
        node("Add", ["m3", "c2"], ["a3"], name="fc2_bias"),
        node("Add", ["r1", "a3"], ["y"], name="residual2"),
    ]
    return built(nodes, ["N", 5, 16], constants)


def stream() -> Model:
    """Projection + positions -> [norm -> MLP -> residual] -> norm -> head: a whole residual stream."""
    rng = np.random.default_rng(5)
    shapes = {"we": (16, 16), "be": 16, "pos": (1, 5, 16), "g": 16, "b": 16, "w1": (16, 32), "c1": 32, "w2": (32, 16), "c2": 16}
    shapes |= {"gf": 16, "bf": 16, "wh": (16, 4)}
    constants = {n: (rng.standard_normal(s) * 0.3).astype(np.float32) for n, s in shapes.items()}
    nodes = [
        node("MatMul", ["x", "we"], ["m0"], name="embed"),
        node("Add", ["m0", "be"], ["e"], name="embed_bias"),
        node("Add", ["e", "pos"], ["s0"], name="positions"),
        node("LayerNormalization", ["s0", "g", "b"], ["n"], name="norm"),
        node("MatMul", ["n", "w1"], ["m1"], name="fc1"),
        node("Add", ["m1", "c1"], ["a1"], name="fc1_bias"),
        node("Relu", ["a1"], ["u"], name="relu"),
        node("MatMul", ["u", "w2"], ["m2"], name="fc2"),
        node("Add", ["m2", "c2"], ["a2"], name="fc2_bias"),
        node("Add", ["s0", "a2"], ["s1"], name="residual"),
        node("LayerNormalization", ["s1", "gf", "bf"], ["nf"], name="final"),
        node("MatMul", ["nf", "wh"], ["y"], name="head"),
    ]
    return built(nodes, ["N", 5, 16], constants)


def linear() -> Model:
    """One MatMul + Add."""
    rng = np.random.default_rng(1)
    constants = {"w": rng.standard_normal((16, 16)).astype(np.float32), "b": rng.standard_normal(16).astype(np.float32)}
    return built(
        [node("MatMul", ["x", "w"], ["m"], name="fc"), node("Add", ["m", "b"], ["y"], name="bias")], ["N", 5, 16], constants
    )


def chain() -> Model:
    """LayerNorm in primitive operators."""
    rng = np.random.default_rng(2)
    constants = {"g": rng.standard_normal(16).astype(np.float32), "b": rng.standard_normal(16).astype(np.float32)}
    constants |= {"two": np.float32(2), "eps": np.float32(1e-5)}
    nodes = [
        node("ReduceMean", ["x"], ["m"], name="mean", axes=[-1]),
        node("Sub", ["x", "m"], ["d"], name="centre"),
        node("Pow", ["d", "two"], ["p"], name="square"),
        node("ReduceMean", ["p"], ["v"], name="variance", axes=[-1]),
        node("Add", ["v", "eps"], ["e"], name="epsilon"),
        node("Sqrt", ["e"], ["r"], name="root"),
        node("Div", ["d", "r"], ["n"], name="normalise"),
        node("Mul", ["n", "g"], ["s"], name="gamma"),
        node("Add", ["s", "b"], ["y"], name="beta"),
    ]
    return built(nodes, ["N", 5, 16], constants)


def wide() -> Model:
    """One Gemm with a transposed weight."""
    rng = np.random.default_rng(1)
    constants = {"w": rng.standard_normal((16, 32)).astype(np.float32), "b": rng.standard_normal(16).astype(np.float32)}
    return built([node("Gemm", ["x", "w", "b"], ["y"], name="fc", transB=1)], ["N", 32], constants)


def untidy() -> Model:
    """Identity, Dropout, a neutral Add, a zero Pad and a shape that can be computed."""
    constants = {"w": np.ones((16, 16), np.float32), "zero": np.float32(0), "pads": np.zeros(6, np.int64), "two": np.float32(2)}
    nodes = [
        node("Identity", ["w"], ["w_again"], name="alias"),
        node("Mul", ["w_again", "two"], ["w_twice"], name="constant_work"),
        node("MatMul", ["x", "w_twice"], ["m"], name="fc"),
        node("Add", ["m", "zero"], ["a"], name="add_zero"),
        node("Dropout", ["a"], ["d"], name="dropout"),
        node("Pad", ["d", "pads"], ["p"], name="pad_nothing"),
        node("Relu", ["p"], ["y"], name="relu"),
    ]
    return built(nodes, ["N", 5, 16], constants)


def normed_input() -> Model:
    """BatchNormalization of the picture, in front of a convolution without padding."""
    rng = np.random.default_rng(8)
    constants = {n: rng.uniform(0.5, 2, 3).astype(np.float32) for n in ("scale", "shift", "mean", "var")}
    constants["w"] = rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    nodes = [
        node("BatchNormalization", ["x", "scale", "shift", "mean", "var"], ["n"], name="bn"),
        node("Conv", ["n", "w"], ["y"], name="conv"),
    ]
    return built(nodes, ["N", 3, 16, 16], constants)


def axes() -> Model:
    """ReduceMean with its axes as an attribute (opset 17)."""
    return built([node("ReduceMean", ["x"], ["y"], name="mean", axes=[1], keepdims=0)], ["N", 5, 16], {})


def scaled() -> Model:
    """x / sqrt(channels), the number of channels read from the shape, as PyTorch exports attention."""
    constants = {"last": np.array([-1]), "end": np.array([2**31 - 1]), "one": np.ones(1, np.float32)}
    nodes = [
        node("Shape", ["x"], ["s"], name="shape"),
        node("Slice", ["s", "last", "end"], ["d"], name="channels"),
        node("Cast", ["d"], ["f"], name="cast", to=1),
        node("Sqrt", ["f"], ["r"], name="root"),
        node("Div", ["one", "r"], ["q"], name="inverse"),
        node("Mul", ["x", "q"], ["y"], name="scale"),
    ]
    return built(nodes, ["N", 5, 16], constants)


PICTURE = (4, 3, 16, 16)
GOLDENS = (
    Golden("canonicalize", "canonicalize", untidy),
    Golden("fold-bn", "canonicalize,fold-bn", stem, shape=PICTURE),
    Golden("fold-bn-behind", "canonicalize,fold-bn", normed_input, shape=PICTURE),
    Golden("fold-pad", "canonicalize,fold-pad", stem, shape=PICTURE),
    Golden("space-to-depth", "canonicalize,fold-bn,space-to-depth", stem, "ort", shape=PICTURE),
    Golden("gelu-order", "canonicalize,gelu-order", block, "ort"),
    Golden("opset", "canonicalize,opset", axes),
    Golden("split-qkv", "canonicalize,split-qkv", block),
    Golden("bias-rank", "canonicalize,bias-rank", linear, "ort"),
    Golden("smooth", "smooth", block, shape=(16, 5, 16)),
    Golden("smooth-shift", "smooth{shift sites=norm}", block),
    Golden("repq", "repq", block),
    Golden("repq-smooth", "repq,smooth", block, shape=(16, 5, 16)),
    Golden("rotate", "canonicalize,rotate{r4=block}", block),
    Golden("rotate-fold", "canonicalize,split-qkv,rotate{mean=fold r2=false}", stream),
    Golden("center", "canonicalize,split-qkv,center", block),
    Golden("center-softmax", "canonicalize,split-qkv,center{softmax heads norm=false}", block),
    Golden("split-shortcut", "canonicalize,split-shortcut", joined, shape=PICTURE),
    Golden("equalize", "canonicalize,equalize", joined, shape=PICTURE),
    Golden("absorb-bias", "canonicalize,fold-bn,absorb-bias", biased, shape=PICTURE),
    Golden("annotate", "canonicalize,annotate", block),
    Golden("integer", "canonicalize,opset,annotate,rtn,integer", stream, "integer"),
    Golden("integer-4bit", "canonicalize,opset,annotate,rtn,integer", linear, "integer", "w4a8"),
    Golden(
        "integer-fused",
        "canonicalize,fold-pad,fold-bn,opset,annotate,rtn,integer{profile=ort-fused}",
        stem,
        "integer",
        shape=PICTURE,
    ),
    Golden("fold-dims", "canonicalize,fold-dims", scaled),
    Golden("annotate-ort", "canonicalize,annotate", block, "ort"),
    Golden("log2-softmax", "canonicalize,annotate,log2-softmax{kind=log-sqrt2}", block, "ort", "w6a6"),
    Golden("log2-softmax-lowered", "canonicalize,annotate,log2-softmax,rtn,insert-qdq", block, "ort", "w4a4"),
    Golden(
        "log2-softmax-fp8",
        "canonicalize,opset,annotate{attention=all},log2-softmax{deploy=fp8},rtn,insert-qdq",
        block,
        "rtx",
        "fp8",
    ),
    Golden("log2-softmax-twin", "canonicalize,annotate,log2-softmax{kind=twin bits=3},rtn,insert-qdq", block, "ort"),
    Golden("compand-gelu", "canonicalize,annotate,compand-gelu", block, "ort", "w4a4"),
    Golden("bias-reparam", "canonicalize,annotate,compand-gelu{bits=3},rtn,bias-reparam,insert-qdq", block, "ort"),
    Golden("split-range", "canonicalize,split-range{softmax}", block),
    Golden("rtn", "canonicalize,annotate,rtn", linear),
    Golden("rtn-4bit", "canonicalize,annotate,rtn", linear, scheme="w4a8"),
    Golden("bias-correct", "canonicalize,annotate,rtn,bias-correct", linear, scheme="w4a8"),
    Golden("bias-correct-bn", "canonicalize,fold-bn,annotate,rtn,bias-correct{mode=bn}", biased, scheme="w4a8", shape=PICTURE),
    Golden("bias-correct-sequential", "canonicalize,annotate,rtn,bias-correct{mode=sequential}", linear, scheme="w4a8"),
    Golden("insert-qdq", "canonicalize,opset,annotate,rtn,insert-qdq", linear),
    Golden("insert-qdq-ort", "canonicalize,annotate,rtn,insert-qdq", linear, "ort"),
    Golden("insert-qdq-6bit", "canonicalize,opset,annotate,rtn,insert-qdq", linear, scheme="w6a6"),
    Golden("insert-qdq-int4", "canonicalize,opset,annotate,rtn,insert-qdq", linear, scheme="w4a16"),
    Golden("fuse-norm", "canonicalize,fuse-norm", chain, scheme="fp16"),
    Golden("annotate-nvfp4", "canonicalize,annotate", block, scheme="nvfp4"),
    Golden("insert-qdq-nvfp4", "canonicalize,opset,annotate,rtn,insert-qdq", wide, scheme="nvfp4", shape=(4, 32)),
    Golden("insert-qdq-mxfp8", "canonicalize,opset,annotate,rtn,insert-qdq", wide, scheme="mxfp8", shape=(4, 32)),
    Golden("fp16", "canonicalize,fp16", linear, scheme="fp16"),
    Golden("fp16-island", "canonicalize,fp16", chain, scheme="fp16"),
    Golden("bf16", "canonicalize,bf16", linear, scheme="bf16"),
)
