"""What a pass does not list as moved keeps its values: statistics of it are used again without another look."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from qcompile.calib.observe import Told
from qcompile.calib.observe.change import AffineMap, Changes
from qcompile.ir.model import Model
from qcompile.pipeline import registry
from qcompile.pipeline.base import Kind
from tests.passes.measures import outputs
from tests.passes.models import Feeds, fixture, fixture_arrays
from tests.passes.running import SweepOf, context, prefix, run_passes

MODELS = ("timm_vit_dy23", "hf_llama_dy23", "hybrid_ts17", "stem", "joined", "biased")
SPECS = [
    *(n for n in registry.names() if (p := registry.pass_named(n)).kind is Kind.EQUIVALENT and not p.is_form()),
    *("absorb-bias", "smooth{search}", "rotate{r4=block mean=fold}", "center{balance gelu softmax}", "equalize{by=weights}"),
]
Values = dict[str, NDArray[np.floating]]


def tensors(model: Model, feeds: Feeds) -> Values:
    """Every float32 tensor that a node of the main graph makes, by name."""
    exposed = model.clone()
    made = [v for node in exposed.graph for v in node.outputs if v.name and v.dtype is not None and v.dtype.is_floating_point()]
    exposed.graph.outputs.clear()
    exposed.graph.outputs.extend(made)
    return dict(zip((str(v.name) for v in made), outputs(exposed, feeds), strict=True))


def worked(spec: str, name: str, feeds: Feeds) -> tuple[Model, Model, Changes]:
    """The model in front of a pass and behind it, and what the pass says of its tensors."""
    ctx, (p,) = context("trt"), registry.parse(spec)
    before, _ = run_passes(fixture(name), prefix(p, ctx), feeds, ctx)
    after = before.clone()
    ctx.told = Told(SweepOf(before, feeds).collect(before, list(dict.fromkeys(p.probes(after, ctx)))))
    return before, after, p.apply(after, ctx).changes


def mapped(x: NDArray[np.floating], change: AffineMap) -> list[NDArray[np.floating]]:
    """(x - t) / r along the last axis or, of pictures, the second."""
    c = change.r.size
    shapes = [(-1,)] if x.shape[-1] == c or c == 1 else []
    shapes += [(-1, *(1,) * (x.ndim - 2))] if x.ndim > 2 and x.shape[1] == c else []
    return [(x - change.t.reshape(s) * np.ones(1)) / change.r.reshape(s) for s in shapes]


def close(a: NDArray[np.floating], b: NDArray[np.floating]) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max(initial=0) <= 2e-4 * max(np.abs(a).max(initial=0), 1e-6))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_not_listed_keeps_its_values(spec: str, name: str) -> None:
    feeds = fixture_arrays(name)
    before, after, changes = worked(spec, name, feeds)
    old, new = tensors(before, feeds), tensors(after, feeds)
    assert not changes.moved & changes.maps.keys()
    for tensor in old.keys() & new.keys() - changes.moved - changes.maps.keys():
        assert close(old[tensor], new[tensor]), f"{tensor} moved"
    for tensor in changes.maps.keys() & old.keys() & new.keys():
        assert any(close(m, new[tensor]) for m in mapped(old[tensor], changes.maps[tensor])), f"{tensor} is not the map of it"
    for tensor, (source, change) in changes.derived.items():
        assert any(close(m, new[tensor]) for m in mapped(old[source], change)), f"{tensor} is not the map of {source}"
