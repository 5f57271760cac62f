"""What ONNX Runtime's optimizer fuses, RotaryEmbedding and Einsum in plain operators: equal to the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from tests.passes.forms.apart import OWN, RNG, assert_same, random, single, taken_apart
from tests.passes.forms.test_canonicalize import info, model_of

X = random(2, 5, 16)
C = {n: random(16) for n in "gbc"}
WORDS = {"i": RNG.integers(0, 9, (2, 5)).astype(np.int32), "s": RNG.integers(0, 2, (2, 5)).astype(np.int32)}
TABLES = {"w": random(9, 16), "p": random(8, 16), "t": random(2, 16)}
PICTURE, KERNEL = {"x": random(2, 3, 5, 8)}, {"w": random(4, 3, 3, 3) / 5}
SUMMED, BIASED = {**PICTURE, "z": random(2, 4, 5, 8)}, {**KERNEL, "b": random(4)}
CLIPPED = {"pads": [1] * 4, "activation": "Clip", "activation_params": [0.0, 6.0]}
SWAPPED = dict.fromkeys(("transBatchA", "transBatchB", "transB"), 1)
DENSE = {"w": random(4, 8), "b": random(4)}


@pytest.mark.parametrize("opset", [11, 14, 17, 20])
@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "feeds", "constants", "attributes"),
    [
        ("BiasGelu", "x b", "y", {}, C, {}),
        ("Gelu", "x", "y", {}, {}, {}),
        ("FastGelu", "x", "y", {}, {}, {}),
        ("FastGelu", "x b", "y", {}, C, {}),
        ("QuickGelu", "x", "y", {}, {}, {"alpha": 1.702}),
        ("SkipLayerNormalization", "x s g b c", "y - - t", {"s": random(2, 5, 16)}, C, {"epsilon": 1e-5}),
        ("SkipLayerNormalization", "x s g", "y", {"s": random(5, 16)}, C, {}),
        ("SkipSimplifiedLayerNormalization", "x s g c", "y - - t", {"s": random(2, 5, 16)}, C, {"epsilon": 1e-5}),
        ("FusedMatMul", "x w", "y", {}, {"w": random(7, 16)}, {"transB": 1, "alpha": 1.5}),
        ("FusedMatMul", "x w", "y", {"x": random(2, 3, 5, 8), "w": random(2, 3, 5, 6)}, {}, {"transA": 1, "alpha": 0.5}),
        ("FusedMatMul", "x w", "y", {"x": random(5, 2, 3, 8), "w": random(6, 2, 3, 8)}, {}, SWAPPED),
        ("FusedConv", "x w b z", "y", SUMMED, BIASED, CLIPPED),
        ("FusedConv", "x w", "y", PICTURE, KERNEL, {"activation": "LeakyRelu", "activation_params": [0.1]}),
        ("FusedGemm", "x w b", "y", {"x": random(2, 8)}, DENSE, {"activation": "Relu", "transB": 1}),
    ],
)  # fmt: skip
def test_fused_operators(op: str, inputs: str, outputs: str, feeds: Any, constants: Any, attributes: Any, opset: int) -> None:
    names, results = ([("" if n == "-" else n) for n in text.split()] for text in (inputs, outputs))
    feeds = {"x": X, **feeds}
    stored = {n: a for n, a in constants.items() if n in names}
    after = assert_same(single(op, names, results, feeds, stored, opset=opset, **attributes), feeds)
    assert not any(n.domain for n in after.graph)


@pytest.mark.parametrize("opset", [11, 17])
def test_norms_that_the_opset_has_not(opset: int) -> None:
    for op, inputs in [("SimplifiedLayerNormalization", ["x", "g"]), ("LayerNormalization", ["x", "g", "b"])]:
        stored = {n: C[n] for n in inputs[1:]}
        model = single(op, inputs, ["y"], {"x": X}, stored, domain="", opset=opset, axis=-1, epsilon=1e-5)
        whole = op == "LayerNormalization" and opset >= 17
        assert (op in {n.op_type for n in assert_same(model, {"x": X}).graph}) is whole


def test_embeddings_of_words_positions_and_segments() -> None:
    constants, feeds = {**TABLES, "g": C["g"], "b": C["b"]}, {**WORDS, "m": np.array([[1] * 5, [1, 1, 1, 0, 0]], np.int32)}
    assert_same(single("EmbedLayerNormalization", list("iswptgbm"), ["y", "int_count"], feeds, constants, epsilon=1e-5), feeds)


CACHES = {"c": random(12, 4), "s": random(12, 4)}
AT = RNG.integers(0, 9, (2, 5))


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize(
    ("domain", "inputs", "feeds", "constants", "attributes"),
    [
        (OWN, "x p c s", {"x": random(2, 5, 32), "p": AT}, CACHES, {}),
        (OWN, "x p c s", {"x": random(2, 5, 32), "p": np.array([3])}, CACHES, {"num_heads": 2, "rotary_embedding_dim": 8}),
        (OWN, "x p c s", {"x": random(2, 4, 5, 8), "p": AT}, CACHES, {}),
        ("", "x c s p", {"x": random(2, 5, 32), "p": AT}, CACHES, {"num_heads": 4}),
        ("", "x c s", {"x": random(2, 4, 5, 8), "c": random(2, 5, 4), "s": random(2, 5, 4)}, {}, {}),
        ("", "x c s", {"x": random(2, 4, 5, 8), "c": random(2, 5, 2), "s": random(2, 5, 2)}, {}, {"rotary_embedding_dim": 4}),
    ],
)
def test_rotary_embeddings(domain: str, inputs: str, feeds: Any, constants: Any, attributes: Any, interleaved: int) -> None:
    node = {"domain": domain, "opset": 17 if domain else 23, "interleaved": interleaved, **attributes}
    assert_same(single("RotaryEmbedding", inputs.split(), ["y"], feeds, constants, **node), feeds)


@pytest.mark.parametrize(
    ("equation", "first", "second", "constant"),
    [
        ("bsd,dhk->bshk", (2, 5, 8), (8, 3, 4), "b"),
        ("bshk,hkd->bsd", (2, 5, 3, 4), (3, 4, 8), "b"),
        ("dk,bsd->bsk", (8, 4), (2, 5, 8), "a"),
        ("...d,dk->...k", (2, 5, 8), (8, 4), "b"),
        ("ij,jk", (2, 5), (5, 3), "b"),
        ("bnd,md->bnm", (2, 5, 8), (6, 8), "b"),
        ("abc,bd->acd", (2, 5, 3), (5, 4), "b"),
        ("bctn,cvt->bvn", (2, 4, 3, 5), (4, 6, 3), "b"),
        ("bqhd,bkhd->bhqk", (2, 5, 3, 4), (2, 6, 3, 4), ""),
        ("bhqk,bkhd->bqhd", (2, 3, 5, 6), (2, 6, 3, 4), ""),
        ("...qd,...kd->...qk", (2, 3, 5, 4), (2, 3, 6, 4), ""),
        ("bhwc,hkc->bhwk", (2, 5, 6, 4), (5, 7, 4), ""),
        ("bd,bd->b", (2, 8), (2, 8), ""),
    ],
)
def test_einsum(equation: str, first: tuple[int, ...], second: tuple[int, ...], constant: str) -> None:
    both = {"a": random(*first), "b": random(*second)}
    feeds = {n: a for n, a in both.items() if n != constant}
    stored = {n: a for n, a in both.items() if n == constant}
    after = assert_same(single("Einsum", ["a", "b"], ["y"], feeds, stored, domain="", equation=equation), feeds)
    assert "Einsum" not in {n.op_type for n in after.graph}


@pytest.mark.parametrize(("equation", "words"), [("bsd,e->bsde", "nothing"), ("bsd->bds", "1 operands"), ("bss,bd->bd", "twice")])
def test_an_einsum_that_is_no_product_stays(equation: str, words: str) -> None:
    shapes = {"bsd": (2, 5, 3), "e": (4,), "bss": (2, 5, 5), "bd": (2, 3)}
    feeds = {f"x{i}": random(*shapes[t]) for i, t in enumerate(equation.split("->")[0].split(","))}
    _, kept = taken_apart(single("Einsum", list(feeds), ["y"], feeds, domain="", equation=equation))
    assert len(kept) == 1 and words in kept[0]


def test_what_shows_its_rank_late_is_taken_apart_too() -> None:
    """Behind an operator whose shape nobody infers, inference goes on where that is taken apart."""
    nodes = [
        helper.make_node("BiasGelu", ["x", "b"], ["h"], domain=OWN),
        helper.make_node("FusedMatMul", ["h", "h"], ["y"], domain=OWN, transA=1),
    ]
    model = model_of(nodes, [info("y", None)], weights={"b": random(8)})
    model.ir.opset_imports[OWN] = 1
    after, kept = taken_apart(model)
    assert not kept and not any(n.domain for n in after.graph)
