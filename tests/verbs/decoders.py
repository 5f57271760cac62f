"""Tiny decoders with a cache of keys and values, as exporters write them: Llama, Qwen, Whisper and T5."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from tests.writing import Writing

WIDTH, HEADS, SIZE, WORDS, LAYERS, SOUND = 128, 4, 32, 64, 2, 12


@dataclass
class Decoder(Writing):
    """`kind` says how tokens are placed, normed and activated; whisper and t5 look at an encoder too."""

    kind: str
    inputs: list[Any] = field(default_factory=list[Any])
    outputs: list[Any] = field(default_factory=list[Any])
    rng: Any = field(default_factory=lambda: np.random.default_rng(0))

    @property
    def groups(self) -> int:
        """Key heads: half of the query heads in Llama and Qwen."""
        return HEADS // 2 if self.kind in ("llama", "qwen") else HEADS

    def info(self, name: str, shape: list[Any], kind: int = T.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    def linear(self, x: str, name: str, rows: int, width: int, bias: bool = False) -> str:
        weight = self.const(f"{name}.w", (self.rng.standard_normal((rows, width)) / rows**0.5).astype(np.float32))
        y = self.op("MatMul", [x, weight], f"{name}.m" if bias else name)
        return self.op("Add", [y, self.const(f"{name}.b", np.full(width, 0.1, np.float32))], name) if bias else y

    def norm(self, x: str, name: str) -> str:
        gamma = self.const(f"{name}.g", np.exp(0.2 * self.rng.standard_normal(WIDTH)).astype(np.float32))
        if self.kind == "whisper":
            return self.op("LayerNormalization", [x, gamma, self.const(f"{name}.b", np.zeros(WIDTH, np.float32))], name)
        mean = self.op("ReduceMean", [self.op("Pow", [x, "two"], f"{name}.sq")], f"{name}.mean", axes=[-1])
        root = self.op("Sqrt", [self.op("Add", [mean, "eps"], f"{name}.var")], f"{name}.root")
        return self.op("Mul", [self.op("Div", [x, root], f"{name}.d"), gamma], name)

    def heads(self, x: str, name: str, count: int) -> str:
        shape = self.const(f"{name}.shape", np.array([0, -1, count, SIZE]))
        return self.op("Transpose", [self.op("Reshape", [x, shape], f"{name}.r")], name, perm=[0, 2, 1, 3])

    def turned(self, x: str, name: str) -> str:
        """Rotary embedding, halves turned as Hugging Face does."""
        half = [self.const(f"i{i}", np.array([i])) for i in (0, SIZE // 2, SIZE)]
        low, high = (self.op("Slice", [x, a, b, "last"], f"{name}.{a}") for a, b in ((half[0], half[1]), (half[1], half[2])))
        other = self.op("Concat", [self.op("Neg", [high], f"{name}.neg"), low], f"{name}.other", axis=-1)
        return self.op("Add", [self.op("Mul", [x, "cos"], f"{name}.c"), self.op("Mul", [other, "sin"], f"{name}.s")], name)

    def attention(self, q: str, k: str, v: str, name: str, mask: str = "") -> str:
        times = HEADS // self.groups if "self" in name else 1
        k, v = (self.repeated(x, f"{name}.{n}", times) for x, n in ((k, "kk"), (v, "vv")))
        s = self.op("MatMul", [q, self.op("Transpose", [k], f"{name}.kt", perm=[0, 1, 3, 2])], f"{name}.s")
        s = s if self.kind == "t5" else self.op("Mul", [s, "scale"], f"{name}.scaled")
        s = self.op("Add", [s, mask], f"{name}.masked") if mask else s
        o = self.op("MatMul", [self.op("Softmax", [s], f"{name}.p", axis=-1), v], f"{name}.o")
        o = self.op("Reshape", [self.op("Transpose", [o], f"{name}.ot", perm=[0, 2, 1, 3]), "joined"], f"{name}.or")
        return self.linear(o, f"{name}.out", WIDTH, WIDTH)

    def repeated(self, x: str, name: str, times: int) -> str:
        if times == 1:
            return x
        wide = self.op("Expand", [self.op("Unsqueeze", [x, "two_i"], f"{name}.u"), "times"], f"{name}.e")
        return self.op("Reshape", [wide, "repeated"], name)

    def cached(self, layer: int, side: str, fresh: str, part: str) -> str:
        past, present = f"past_key_values.{layer}.{side}{part}", f"present.{layer}.{side}{part}"
        self.inputs.append(self.info(past, ["batch", self.groups, "past", SIZE]))
        self.outputs.append(self.info(present, ["batch", self.groups, "total", SIZE]))
        return self.op("Concat", [past, fresh], present, axis=2)

    def layer(self, x: str, i: int, mask: str) -> str:
        n, wide = self.norm(x, f"{i}.n1"), self.groups * SIZE
        parts = [("q", WIDTH, HEADS), ("k", wide, self.groups), ("v", wide, self.groups)]
        q, k, v = (self.heads(self.linear(n, f"{i}.{p}l", WIDTH, w, self.kind == "qwen"), f"{i}.{p}", c) for p, w, c in parts)
        if self.kind in ("llama", "qwen"):
            q, k = self.turned(q, f"{i}.qr"), self.turned(k, f"{i}.kr")
        side = "decoder." if self.kind in ("whisper", "t5") else ""
        k, v = self.cached(i, side, k, "key"), self.cached(i, side, v, "value")
        x = self.op("Add", [x, self.attention(q, k, v, f"{i}.self", mask)], f"{i}.x1")
        if side:
            n = self.norm(x, f"{i}.n2")
            q = self.heads(self.linear(n, f"{i}.cql", WIDTH, WIDTH), f"{i}.cq", HEADS)
            k, v = (
                self.heads(self.linear("encoder_hidden_states", f"{i}.c{p}l", WIDTH, WIDTH), f"{i}.c{p}", HEADS) for p in "kv"
            )
            x = self.op("Add", [x, self.attention(q, k, v, f"{i}.cross")], f"{i}.x2")
        n = self.norm(x, f"{i}.n3")
        h = self.linear(n, f"{i}.up", WIDTH, 4 * WIDTH, self.kind == "whisper")
        if self.kind in ("llama", "qwen"):
            gate = self.linear(n, f"{i}.gate", WIDTH, 4 * WIDTH)
            h = self.op("Mul", [self.op("Mul", [gate, self.op("Sigmoid", [gate], f"{i}.sig")], f"{i}.silu"), h], f"{i}.h")
        else:
            h = self.op("Relu", [h], f"{i}.h")
        return self.op("Add", [x, self.linear(h, f"{i}.down", 4 * WIDTH, WIDTH)], f"{i}.x3")

    def places(self) -> None:
        """Numbers of queries and keys, [L] and [S]."""
        past = f"past_key_values.0.{'decoder.' if self.kind in ('whisper', 't5') else ''}key"
        length = self.op("Gather", [self.op("Shape", ["input_ids"], "shape"), "one_i"], "length", axis=0)
        before = self.op("Gather", [self.op("Shape", [past], "past_shape"), "two_0"], "before", axis=0)
        total = self.op("Add", [length, before], "total_length")
        self.op("Range", ["zero_i", total, "one_i"], "keys")
        self.op("Range", [before, total, "one_i"], "queries")

    def mask(self) -> str:
        """[1, 1, L, S]: keys behind the query get float32's lowest number; T5 adds its buckets' biases."""
        rows = self.op("Unsqueeze", ["queries", "one_v"], "rows")
        m = self.op("Where", [self.op("LessOrEqual", ["keys", rows], "seen"), "zero", "lowest"], "m2")
        if self.kind != "t5":
            return self.op("Unsqueeze", [m, "front"], "mask")
        far = self.op("Min", [self.op("Abs", [self.op("Sub", [rows, "keys"], "back")], "distance"), "seven"], "bucket")
        table = self.const("table", self.rng.standard_normal((8, HEADS)).astype(np.float32))
        bias = self.op("Transpose", [self.op("Gather", [table, far], "biases")], "bias", perm=[2, 0, 1])
        return self.op("Unsqueeze", [self.op("Add", [bias, m], "m3"), "zero_v"], "mask")

    def model(self) -> onnx.ModelProto:
        numbers: dict[str, Any] = {
            "two": np.float32(2), "eps": np.float32(1e-6), "scale": np.float32(SIZE**-0.5), "zero": np.float32(0),
            "lowest": np.float32(np.finfo(np.float32).min), "one_i": np.int64(1), "two_0": np.int64(2), "zero_i": np.int64(0),
            "seven": np.int64(7), "last": np.array([-1]), "two_i": np.array([2]), "one_v": np.array([1]), "zero_v": np.array([0]),
            "front": np.array([0, 1]), "joined": np.array([0, -1, WIDTH]), "times": np.array([1, 1, HEADS // self.groups, 1, 1]),
            "repeated": np.array([0, HEADS, -1, SIZE]),
        }  # fmt: skip
        for name, value in numbers.items():
            self.const(name, value)
        self.inputs.append(self.info("input_ids", ["batch", "length"], T.INT64))
        self.inputs.append(self.info("attention_mask", ["batch", "total"], T.INT64))
        if self.kind in ("whisper", "t5"):
            self.inputs.append(self.info("encoder_hidden_states", ["batch", SOUND, WIDTH]))
        self.places()
        words = self.const("words", self.rng.standard_normal((WORDS, WIDTH)).astype(np.float32))
        x = self.op("Gather", [words, "input_ids"], "embedded")
        if self.kind == "whisper":
            table = self.const("places", 0.3 * self.rng.standard_normal((64, WIDTH)).astype(np.float32))
            x = self.op("Add", [x, self.op("Gather", [table, "queries"], "place")], "placed")
        if self.kind in ("llama", "qwen"):
            turns = np.arange(64)[:, None] / 1e4 ** (np.arange(SIZE) % (SIZE // 2) / (SIZE // 2))
            for name, value in (("cos", np.cos(turns)), ("sin", np.sin(turns))):
                self.op("Gather", [self.const(f"{name}_table", value.astype(np.float32)), "queries"], name)
        mask = self.op("Add", [self.mask(), self.padding()], "mask_all")
        for i in range(LAYERS):
            x = self.layer(x, i, mask)
        logits = self.linear(self.norm(x, "end"), "logits", WIDTH, WORDS)
        outputs = [self.info(logits, ["batch", "length", WORDS]), *self.outputs]
        stored = [numpy_helper.from_array(a, n) for n, a in self.stored.items()]
        graph = helper.make_graph(self.nodes, self.kind, self.inputs, outputs, stored)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    def padding(self) -> str:
        """[batch, 1, 1, S] from the mask of tokens."""
        kept = self.op("Cast", ["attention_mask"], "kept", to=T.BOOL)
        return self.op(
            "Where", [self.op("Unsqueeze", [kept, "middle"], "kept4"), "zero", self.const("low", np.float32(-1e9))], "pad"
        )


def decoder(kind: str) -> onnx.ModelProto:
    """[batch, length] tokens and caches -> logits and caches."""
    made = Decoder(kind)
    made.const("middle", np.array([1, 2]))
    return made.model()


def prompts(kind: str, count: int = 6, length: int = 10) -> dict[str, Any]:
    """Tokens, and what the encoder heard."""
    rng = np.random.default_rng(3)
    made: dict[str, Any] = {"input_ids": rng.integers(0, WORDS, (count, length))}
    if kind in ("whisper", "t5"):
        made["encoder_hidden_states"] = rng.standard_normal((count, SOUND, WIDTH)).astype(np.float32)
    return made
