"""Every structure found in exporter output is exact: random maps folded at the sites leave the model's output as it was.

This checks channel order, head layout, packed columns and the claim that nothing else reads a folded value.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qcompile import structure as match
from qcompile.ir import ops
from qcompile.ir.edit import add_constant, new_node, set_constant, splice_after
from tests.structure.exports import INDEX, feeds, load

TRANSFORMERS = [name for name, entry in INDEX.items() if entry.get("norm_kind") in ("LayerNorm", "RMSNorm")]
RNG = np.random.default_rng(7)


def run(model: ir.Model, name: str) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds(name))[0]


@cache
def baseline(name: str) -> np.ndarray:
    return run(load(name), name)


def assert_same(model: ir.Model, name: str) -> None:
    expected, got = baseline(name), run(model, name)
    assert np.abs(got - expected).max() <= 2e-5 * np.abs(expected).max()


def scale(count: int) -> np.ndarray:
    return np.exp(RNG.uniform(-1.5, 1.5, count))


def array(value: ir.Value | None) -> np.ndarray:
    found = ops.const_array(value)
    assert found is not None
    return found.astype(np.float64)


def weight(linear: match.Linear) -> np.ndarray:
    """The current weight as [in, out], a view that `store` takes back."""
    return np.moveaxis(array(linear.node.inputs[linear.weight_slot]), (linear.in_axis, linear.out_axis), (0, 1))


def store(linear: match.Linear, w: np.ndarray) -> None:
    set_constant(linear.node, linear.weight_slot, np.moveaxis(w, (0, 1), (linear.in_axis, linear.out_axis)))


def bias(linear: match.Linear) -> np.ndarray:
    assert linear.bias_node is not None and linear.bias_slot is not None
    return array(linear.bias_node.inputs[linear.bias_slot])


def store_bias(linear: match.Linear, b: np.ndarray) -> None:
    assert linear.bias_node is not None and linear.bias_slot is not None
    set_constant(linear.bias_node, linear.bias_slot, b)


def fold_norm(site: match.NormToLinears) -> None:
    norm, count = site.norm, site.norm.channels
    assert count is not None and norm.gamma_site is not None
    shifts = site.shift_ok and norm.beta is not None and all(linear.bias is not None for linear in site.linears)
    r, t = scale(count), RNG.standard_normal(count) * shifts
    set_constant(*norm.gamma_site, array(norm.gamma) / r)
    if norm.beta is not None and norm.beta_site is not None:
        set_constant(*norm.beta_site, (array(norm.beta) - t) / r)
    for linear in site.linears:
        w = weight(linear)
        if shifts:
            store_bias(linear, bias(linear) + t @ w)
        store(linear, r[:, None] * w)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_norm_folds_are_exact(name: str) -> None:
    model = load(name)
    sites = match.find_norm_to_linears(model.graph)
    for site in sites:
        fold_norm(site)
    assert sites.found
    assert_same(model, name)


def fold_values(site: match.VProjection) -> None:
    width = site.linear.out_channels
    s, v0, used = np.ones(width), np.zeros(width), site.v_columns
    s[used], v0[used] = scale(len(used)), RNG.standard_normal(len(used))
    if site.linear.bias is None or site.out.bias is None:
        v0[:] = 0
    else:
        store_bias(site.linear, (bias(site.linear) - v0) / s)
        store_bias(site.out, bias(site.out) + v0[site.columns] @ weight(site.out))
    store(site.linear, weight(site.linear) / s)
    store(site.out, s[site.columns, None] * weight(site.out))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_value_folds_are_exact(name: str) -> None:
    model = load(name)
    sites = match.find_v_projections(model.graph)
    for site in sites:
        fold_values(site)
    assert len(sites) == (0 if INDEX[name].get("seen_qkv") == "attention-op" else INDEX[name]["attention_blocks"])
    assert_same(model, name)


def shift_keys(attention: match.Attention) -> None:
    columns = attention.k.columns
    assert columns is not None
    if attention.k.linear.bias is None:
        return
    b = bias(attention.k.linear)
    b[columns.reshape(-1)] += RNG.standard_normal(columns.size)
    store_bias(attention.k.linear, b)


def exchange_scales(attention: match.Attention) -> None:
    q, k = attention.q, attention.k
    assert q.columns is not None and k.columns is not None
    t = scale(q.columns.size)
    for projection, factor in ((q, t), (k, 1 / t)):
        assert projection.columns is not None
        full = np.ones(projection.linear.out_channels)
        full[projection.columns.reshape(-1)] = factor
        store(projection.linear, weight(projection.linear) * full)
        if projection.linear.bias is not None:
            store_bias(projection.linear, bias(projection.linear) * full)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_query_and_key_columns_are_exact(name: str) -> None:
    model = load(name)
    for attention in match.find_attentions(model.graph):
        if attention.has_rope:
            assert attention.q.columns is None and attention.k.columns is None
            continue
        shift_keys(attention)
        exchange_scales(attention)
    assert_same(model, name)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_mlp_folds_are_exact(name: str) -> None:
    model = load(name)
    mlps = match.find_mlps(model.graph)
    for mlp in mlps:
        s = scale(mlp.fc2.in_channels)
        factor = add_constant(model.graph, "inverse", 1 / s.astype(np.float32))
        mul = new_node(model.graph, "Mul", [mlp.hidden, factor], name="scaled", like=mlp.hidden)
        splice_after(model.graph, mlp.hidden, mul)
        store(mlp.fc2, s[:, None] * weight(mlp.fc2))
    assert mlps.found
    assert_same(model, name)


@pytest.mark.parametrize("name", [n for n, e in INDEX.items() if e.get("activation") == "silu-gated"])
def test_the_up_projection_scales_for_free(name: str) -> None:
    model = load(name)
    for mlp in match.find_mlps(model.graph):
        assert mlp.up is not None and mlp.up is not mlp.fc1
        s = scale(mlp.fc2.in_channels)
        store(mlp.up, weight(mlp.up) / s)
        store(mlp.fc2, s[:, None] * weight(mlp.fc2))
    assert_same(model, name)
