"""What the finders see in the output of real exporters, against what is known about the models."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
import pytest

from qcompile import structure as match
from qcompile.passes.equivalent.split_shortcut import find_shortcuts
from tests.structure.exports import INDEX, prepared

KINDS = {"erf": "gelu-erf", "tanh": "gelu-tanh", "quick": "quick-gelu", "silu-gated": "swiglu"}
FUSED = [name for name, entry in INDEX.items() if entry.get("seen_qkv") == "attention-op"]
UNFUSED = [name for name in INDEX if name not in FUSED]
GATHERED = {"hf_swin_dy18"}
"""Its mean pooling is exported as ReduceMean, Reshape and a Gather with computed indices."""


@pytest.fixture
def graph(request: pytest.FixtureRequest) -> ir.Graph:
    return prepared(request.param).graph


def by_name(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("graph", "entry"), [(n, INDEX[n]) for n in names], indirect=["graph"], ids=names)


@by_name(list(INDEX))
def test_all_norms_are_found(graph: ir.Graph, entry: dict) -> None:
    norms = match.find_norms(graph)
    expected = 0 if entry.get("norm_kind") == "BatchNorm" else entry["norm_count"]
    kind = {"LayerNorm": "layer", "RMSNorm": "rms", "GroupNorm": "group"}.get(entry.get("norm_kind", ""))
    assert (len(norms), norms.refused) == (expected, ())
    assert {n.kind for n in norms} <= {kind}
    assert all(n.gamma_site is not None and n.channels is not None for n in norms)


@by_name([n for n in INDEX if n not in GATHERED])
def test_each_norm_folds_into_its_linears_or_is_refused(graph: ir.Graph, entry: dict) -> None:
    folds = match.find_norm_to_linears(graph)
    legal = [norm for norm in entry["norms"] if norm["linears"] and not norm["feeds_residual"]]
    assert [len(site.linears) for site in folds] == [len(norm["linears"]) for norm in legal]
    residual = [norm for norm in entry["norms"] if norm["feeds_residual"]]
    assert len([r for r in folds.refused if "feeds the residual Add" in r.reason]) == len(residual)


@by_name([n for n, e in INDEX.items() if "swin" in n and n not in GATHERED])
def test_only_real_padding_forbids_a_shift(graph: ir.Graph, entry: dict) -> None:
    refused = [site.shift_refusal for site in match.find_norm_to_linears(graph) if not site.shift_ok]
    assert bool(refused) == entry.get("nonzero_pads", False)
    assert all(reason is not None and reason.startswith("Pad ") for reason in refused)


def test_a_gather_with_computed_indices_is_refused() -> None:
    refused = match.find_norm_to_linears(prepared("hf_swin_dy18").graph).refused
    assert Counter("gathers channels" in r.reason for r in refused)[True] == 1


@by_name(UNFUSED)
def test_attention_heads(graph: ir.Graph, entry: dict) -> None:
    attentions = match.find_attentions(graph)
    assert (len(attentions), attentions.refused) == (entry["attention_blocks"], ())
    assert [a.heads for a in attentions] == entry.get("heads", [])
    assert {a.packed for a in attentions} <= {(entry.get("qkv") or "").startswith("fused")}
    assert {a.has_rope for a in attentions} <= {"llama" in entry["family"]}
    assert not any(a.has_qk_norm for a in attentions)


@by_name(UNFUSED)
def test_every_value_projection_is_a_site(graph: ir.Graph, entry: dict) -> None:
    sites = match.find_v_projections(graph)
    assert (len(sites), sites.refused) == (entry["attention_blocks"], ())
    for site in sites:
        assert len(site.columns) == site.out.in_channels and set(site.columns) == set(site.v_columns)
        assert site.shift_ok


@pytest.mark.parametrize("name", FUSED)
def test_fused_attention_is_refused(name: str) -> None:
    refused = match.find_attentions(prepared(name).graph).refused
    assert [r.reason for r in refused] == [
        "fused Attention operator: canonicalize takes it apart where a target quantizes inside"
    ] * 2


@by_name(list(INDEX))
def test_mlps_and_their_activation(graph: ir.Graph, entry: dict) -> None:
    mlps = match.find_mlps(graph)
    activation = entry.get("activation")
    assert len(mlps) == entry["mlp_blocks"]
    assert {m.kind for m in mlps} <= {KINDS.get(activation, activation)}
    assert all(m.hidden is not m.fc1.output and m.shift_ok for m in mlps)
    assert {m.up is not None for m in mlps} <= {"llama" in entry["family"]}


@by_name([n for n, e in INDEX.items() if e["mlp_blocks"] and not e["post_norm"] and "swin" not in n])
def test_pre_norm_transformers_have_one_residual_stream(graph: ir.Graph, entry: dict) -> None:
    streams = [s for s in match.find_residual_streams(graph) if s.readers]
    assert len(streams) == 1
    assert len(streams[0].adds) == 2 * entry["mlp_blocks"]
    assert len(streams[0].writers) == 2 * entry["mlp_blocks"] and len(streams[0].readers) == entry["norm_count"]


def test_swin_streams_survive_window_moves_and_rolls() -> None:
    streams = match.find_residual_streams(prepared("timm_swin_ts17").graph)
    assert [len(s.adds) for s in streams] == [4, 2]


@pytest.mark.parametrize("name", ["unet_ts17", "unet_dy18", "unet_dy21"])
def test_unet_shortcuts(name: str) -> None:
    graph = prepared(name).graph
    assert {a.kind for a in match.find_activations(graph)} == {"silu"}
    shortcuts = find_shortcuts(graph).found
    assert shortcuts and all(s.parts is None for s in shortcuts), "a norm stands between the Concat and the convolutions"


@pytest.mark.parametrize("name", ["mobilenet_ts17", "mobilenet_dy18"])
def test_convolution_chains(name: str) -> None:
    chains = match.find_conv_chains(prepared(name).graph)
    assert chains.found and all(c.activation is None or c.activation.kind == "relu6" for c in chains)


@pytest.mark.parametrize("name", ["resnet_bn_ts17"])
def test_batch_norms_between_convolutions(name: str) -> None:
    assert any(c.batch_norm is not None for c in match.find_conv_chains(prepared(name).graph))
