"""Every attention operator in plain ones: equal to ONNX Runtime's kernels, whatever is combined."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.passes.forms.apart import RNG, assert_same, random, single, taken_apart

B, L, S, P, D = 2, 3, 5, 4, 8


def standard(
    *,
    flat: bool = False,
    past: bool = False,
    mask: str = "",
    lengths: bool = False,
    grouped: bool = False,
    mode: int | None = None,
    dynamic: bool = False,
    **attributes: Any,
) -> tuple[Any, dict[str, Any]]:
    """Attention-24 on 3-D (`flat`) or 4-D inputs; `mask` bool or float, one row without a key."""
    heads, groups, total = 6 if grouped else 2, 2, S + P * past

    def shaped(n: int, length: int) -> Any:
        return random(B, length, n * D) if flat else random(B, n, length, D)

    names = ["q", "k", "v", "", "", "", ""]
    feeds: dict[str, Any] = {"q": shaped(heads, L), "k": shaped(groups, S), "v": shaped(groups, S)}
    if mask:
        kept = RNG.integers(0, 2, (B, 1, L, total)).astype(bool)
        kept[0, 0, 1] = False
        feeds["m"] = kept if mask == "bool" else np.where(kept, random(*kept.shape), -np.inf).astype(np.float32)
        names[3] = "m"
    if past:
        feeds |= {"pk": random(B, groups, P, D), "pv": random(B, groups, P, D)}
        names[4:6] = ["pk", "pv"]
    if lengths:
        feeds["n"], names[6] = np.array([2, 5]), "n"
    attributes |= {"q_num_heads": heads, "kv_num_heads": groups} if flat else {}
    attributes |= {} if mode is None else {"qk_matmul_output_mode": mode}
    outputs = ["y", "nk" if past else "", "nv" if past else "", "" if mode is None else "s"]
    lengthy = {L: "L", S: "S", P: "P", total: "T"}
    shapes = {n: [B, *(lengthy.get(d, d) for d in a.shape[1:])] for n, a in feeds.items() if n != "n"} if dynamic else {}
    node = {"inputs": _trimmed(names), "outputs": _trimmed(outputs)}
    return single("Attention", feeds=feeds, domain="", opset=24, shapes=shapes, **node, **attributes), feeds


def _trimmed(names: list[str]) -> list[str]:
    while names and not names[-1]:
        names = names[:-1]
    return names


@pytest.mark.parametrize(("flat", "causal", "dynamic"), list(itertools.product([False, True], repeat=3)))
def test_standard_attention(flat: bool, causal: bool, dynamic: bool) -> None:
    for past, mask, lengths, grouped, cap in itertools.product(
        [False, True], ["", "bool", "float"], [False, True], [False, True], [0.0, 2.0]
    ):
        if (past and lengths) or (cap and (grouped or lengths)):
            continue
        options = {"past": past, "mask": mask, "lengths": lengths, "grouped": grouped, "dynamic": dynamic}
        model, feeds = standard(flat=flat, is_causal=int(causal), softcap=cap, **options)
        after = assert_same(model, feeds)
        assert "Attention" not in {n.op_type for n in after.graph}


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_its_scores_can_be_an_output(mode: int, mask: str) -> None:
    assert_same(*standard(mask=mask, mode=mode, softcap=2.0, is_causal=1, past=True))


def test_a_row_is_guarded_only_where_it_may_be_empty() -> None:
    for options, count in [({}, 0), ({"is_causal": 1}, 0), ({"mask": "bool"}, 1), ({"lengths": True}, 1)]:
        model, _ = standard(**options)
        after, _ = taken_apart(model)
        behind = [n for n in after.graph if n.op_type == "Where" and n.outputs[0].is_graph_output()]
        assert len(behind) == count


def test_the_masks_of_all_layers_are_one() -> None:
    """Whatever an earlier operator wrote of the same tensors is read again."""
    model, _ = standard(mask="bool", is_causal=1)
    node = model.graph.node(0)
    twin = node.__class__("", "Attention", [node.outputs[0], *node.inputs[1:]], attributes=dict(node.attributes), name="twin")
    model.graph.append(twin)
    twin.outputs[0].name = "y2"
    model.graph.outputs.append(twin.outputs[0])
    after, _ = taken_apart(model)
    found = [n.op_type for n in after.graph]
    assert found.count("Softmax") == 2 and found.count("ReduceMax") == 1


H, E = 4, 32
LENGTHS = np.array([3, 6], np.int32)
PADDING = np.array([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]], np.int32)
QKV = {"q": random(2, 5, E), "k": random(2, 6, E), "v": random(2, 6, E)}
SELF = {"q": random(2, 5, E), "k": random(2, 5, E), "v": random(2, 5, E)}
CACHE = {"pk": random(2, H, 3, E // H), "pv": random(2, H, 3, E // H)}
BIAS = {"b": random(3 * E)}


@pytest.mark.parametrize(
    ("inputs", "feeds", "constants", "attributes"),
    [
        ("q k v", QKV, {}, {}),
        ("q k v b", QKV, BIAS, {"scale": 0.2}),
        ("q k v - m", {**QKV, "m": LENGTHS}, {}, {}),
        ("q k v - m", {**QKV, "m": PADDING}, {}, {}),
        ("q k v - m", {**QKV, "m": 0 * PADDING}, {}, {}),
        ("q k v - m", {**QKV, "m": np.tile(PADDING[:, None], (1, 5, 1))}, {}, {}),
        ("q k v - m a", {**QKV, "m": PADDING, "a": random(1, H, 5, 6)}, {}, {}),
        ("q k v", {**QKV, "k": random(2, H, 6, 8), "v": random(2, H, 6, 8)}, {}, {}),
        ("q k v - - - pk pv", {**SELF, **CACHE}, {}, {}),
        ("q k v b - - pk pv", {**SELF, **CACHE}, BIAS, {"unidirectional": 1}),
        ("q k v - m", {**SELF, "m": PADDING[:, :5]}, {}, {"unidirectional": 1}),
    ],
)
def test_multi_head_attention(inputs: str, feeds: Any, constants: Any, attributes: Any) -> None:
    names = ["" if n == "-" else n for n in inputs.split()]
    outputs = ["y", "nk", "nv"] if "pk" in names else ["y"]
    assert_same(single("MultiHeadAttention", names, outputs, feeds, constants, num_heads=H, **attributes), feeds)


X = random(2, 5, 12)
ENDS = np.zeros(4, np.int32)
PROJECTION = {"w": random(12, 3 * E) / 4, "b": random(3 * E)}


@pytest.mark.parametrize(
    ("inputs", "feeds", "attributes"),
    [
        ("x w b", {}, {}),
        ("x w b m", {"m": PADDING[:, :5]}, {}),
        ("x w b m", {"m": np.array([2, 5], np.int32)}, {}),
        ("x w b m", {"m": 0 * PADDING[:, :5]}, {"unidirectional": 1}),
        ("x w b - p", {"p": random(2, 2, H, 3, 8)}, {"unidirectional": 1}),
        ("x w b - - a", {"a": random(2, H, 5, 5)}, {"scale": 0.3}),
    ],
)
def test_attention_with_its_projections(inputs: str, feeds: Any, attributes: Any) -> None:
    names = ["" if n == "-" else n for n in inputs.split()]
    feeds = {"x": X, **feeds}
    model = single("Attention", names, ["y", "n"] if "p" in names else ["y"], feeds, PROJECTION, num_heads=H, **attributes)
    found = [n.op_type for n in assert_same(model, feeds).graph]
    assert found.count("MatMul") == 5  # three projections, two products


def grouped(
    batch: int = 2,
    length: int = 5,
    past: int = 0,
    packed: bool = False,
    bias: bool = False,
    sink: bool = False,
    cache: str = "",
    **attributes: Any,
) -> tuple[Any, dict[str, Any]]:
    heads, groups, size = 4, 2, 16
    feeds: dict[str, Any] = {"sl": np.full(batch, past + length - 1, np.int32)}
    parts = {"q": heads + 2 * groups} if packed else {"q": heads, "k": groups, "v": groups}
    feeds |= {n: random(batch, length, count * size) for n, count in parts.items()}
    feeds |= {n: random(batch, groups, past, size) for n in (("pk", "pv") if past else ())}
    constants: dict[str, Any] = {"tl": np.array(past + length, np.int32)}
    names = ["q", *(("", "") if packed else ("k", "v")), *(("pk", "pv") if past else ("", "")), "sl", "tl"]
    if attributes.get("do_rotary"):
        constants |= {"cos": random(20, size // 2), "sin": random(20, size // 2)}
        names += ["cos", "sin"]
    if bias:
        feeds["a"] = random(1, 1, length, past + length)
        names += [*(("", "") if len(names) == 7 else ()), "", "a"]
    if sink:
        constants["sink"] = random(heads)
        names += [*[""] * (11 - len(names)), "sink"]
    node = {"num_heads": heads, "kv_num_heads": groups, **attributes}
    outputs = ["y", "codes_k", "codes_v"] if cache else ["y", "nk", "nv"]
    if cache:
        node = {"k_quant_type": cache, "v_quant_type": cache, "kv_cache_bit_width": 8, **node}
        many = groups * size if cache == "PER_CHANNEL" else 1
        constants |= {"ks": (0.01 + 0.02 * RNG.random(many)).astype(np.float32), "vs": np.full(many, 0.02, np.float32)}
        names += [*[""] * (12 - len(names)), "ks", "vs"]
        feeds |= {n: RNG.integers(-128, 128, (batch, groups, past, size)).astype(np.int8) for n in ("pk", "pv")}
        names[3:5] = ["pk", "pv"]
    return single("GroupQueryAttention", names, outputs, feeds, constants, **node), feeds


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"past": 4, "length": 1},
        {"past": 4, "length": 3, "batch": 1},
        {"do_rotary": 1},
        {"do_rotary": 1, "past": 4, "length": 1},
        {"do_rotary": 1, "rotary_interleaved": 1, "packed": True},
        {"local_window_size": 3},
        {"local_window_size": 3, "past": 9, "length": 1},
        {"softcap": 2.0, "bias": True},
        {"scale": 0.1, "bias": True},
        {"sink": True},
        {"sink": True, "past": 4, "length": 1, "local_window_size": 3},
        {"sink": True, "bias": True, "softcap": 2.0},
        {"smooth_softmax": 1},
        {"cache": "PER_TENSOR", "past": 4, "length": 1},
        {"cache": "PER_CHANNEL", "past": 4, "length": 1},
        {"cache": "PER_TENSOR", "past": 4, "length": 1, "sink": True, "do_rotary": 1},
    ],
)
def test_group_query_attention(options: dict[str, Any]) -> None:
    assert_same(*grouped(**options))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (grouped(cache="PER_TENSOR", past=4, length=1, kv_cache_bit_width=4)[0], "other codes than int8"),
        (grouped(sliding_window_cache=1, local_window_size=3)[0], "forgets"),
        (single("MultiHeadAttention", ["q", "k", "v"], ["y"], QKV, num_heads=H, unidirectional=1), "unlike length"),
        (single("MultiHeadAttention", ["q", "kv"], ["y"], {"q": QKV["q"], "kv": random(2, 6, H, 2, 8)}, num_heads=H), "value"),
        (
            single("Attention", ["x", "w", "b", "m"], ["y"], {"x": X, "m": np.zeros(4, np.int32)}, PROJECTION, num_heads=H),
            "one axis",
        ),
    ],
)
def test_what_no_plain_operator_does_stays(model: Any, words: str) -> None:
    _, kept = taken_apart(model)
    assert len(kept) == 1 and words in kept[0] and "stays as it is" in kept[0]


def test_onnx_runtime_keeps_its_own_attention_in_one_piece() -> None:
    model = single("MultiHeadAttention", ["q", "k", "v"], ["y"], QKV, num_heads=H)
    after, kept = taken_apart(model, "ort")
    assert not kept and [n.op_type for n in after.graph] == ["MultiHeadAttention"]
