from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.ir.model import Model
from qcompile.passes.equivalent.rotate.rotation import stream_rotation
from qcompile.pipeline import registry
from qcompile.structure.region import find_regions
from tests.passes.equivalent import streams
from tests.passes.measures import constants_of, double_outputs, op_types, outputs, relative_error, sqnr_db, to_double
from tests.passes.running import SweepOf, context, fixture_step, pipeline, run_passes, run_with

ROOT = Path(__file__).parents[3]
FORMS = ("rotate", "rotate{r2=false}", "rotate{r1=false}", "rotate{r1=false r2=false r4=block}", "rotate{r4=block mean=fold}",
         "rotate{kind=klt r4=block}", "rotate{search=4 mean=fold kind=klt}")  # fmt: skip


def canonical(model: Model) -> Model:
    return run_passes(model, registry.parse("canonicalize"), streams.feeds(), context())[0]


def rotated(model: Model, spec: str = "rotate", **options: Any) -> tuple[Model, list[Any]]:
    after, reports = run_passes(canonical(model), registry.parse(spec), streams.feeds(), context(**options))
    return after, list(reports[0].remarks)


def missed(remarks: list[Any]) -> dict[str, str]:
    return {r.node: r.reason for r in remarks if r.kind == "missed"}


@pytest.mark.parametrize("kv", [1, 2, 4], ids=["one shared head", "grouped heads", "a head each"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("spec", FORMS)
def test_folds_are_exact_with_biases(spec: str, kind: str, kv: int) -> None:
    """In float64 (rounding: 1e-15), and in ONNX Runtime's float32."""
    model = canonical(streams.block(kind, kv=kv))
    narrow, _ = run_passes(model, registry.parse(spec), streams.feeds(), context())
    assert relative_error(outputs(model, streams.feeds(6, 1)), outputs(narrow, streams.feeds(6, 1))) <= 5e-6
    wide = to_double(model)
    after, (report,) = run_with(SweepOf(model, streams.feeds()).collect, wide, registry.parse(spec), context())
    assert report.modified
    assert relative_error(double_outputs(wide, streams.feeds(2, 1)), double_outputs(after, streams.feeds(2, 1))) <= 1e-10


def test_everything_that_touches_the_stream_is_found() -> None:
    (region,) = find_regions(canonical(streams.block()).graph)
    assert {str(w.node.name) for w in region.writers} == {"out", "fc2"}
    assert {(str(c.node.name), c.slot) for c in region.constants} == {("embed", 0), ("positions", 1)}
    assert {str(n.norm.node.name) for n in region.norms} == {"norm1", "norm2", "final"} and region.has_mean


def test_the_outliers_are_spread() -> None:
    after, _ = rotated(streams.block(), "rotate{r2=false}")
    table = {n: a for n, a in constants_of(after).items() if a.shape == (streams.VOCAB, streams.C)}
    (rotated_table,) = table.values()
    before = constants_of(streams.block())["table"]
    crest = [float(np.abs(a).max() / np.sqrt(np.square(a).mean())) for a in (before, rotated_table)]
    assert crest[1] < 0.6 * crest[0]


def test_a_tied_embedding_is_duplicated() -> None:
    after, remarks = rotated(streams.block())
    held = [a for a in constants_of(after).values() if sorted(a.shape) == [streams.VOCAB, streams.C]]
    assert len(held) == 2 and any(r.kind == "applied" and "stream of 32 channels" in r.reason for r in remarks)


def test_layer_scale_is_folded_first() -> None:
    after, remarks = rotated(streams.block(form="layer-scale"))
    assert "the constant scale of its branch was folded into it" in [r.reason for r in remarks if r.node == "out"]
    assert op_types(after).count("Mul") == 1, "only the attention's scale is left"
    assert any("stream of 32 channels" in r.reason for r in remarks)


@pytest.mark.parametrize(
    ("form", "named", "words"),
    [
        ("ada-ln", "norm2", "consumer Mul"),
        ("gate", "gate", "writes the stream and is not a linear"),
        ("relu", "on_stream", "the stream"),
        ("stream-scale", "on_stream", "the stream"),
        ("part", "half_of_it", "cannot be followed through Slice"),
        ("output", "residual2", "graph output s2"),
        ("post-norm", "norm2", "post-norm"),
    ],
)
def test_refusals_name_the_node_and_leave_the_stream_alone(form: str, named: str, words: str) -> None:
    model = canonical(streams.block(form=form))
    after, remarks = rotated(model, "rotate{r2=false}")
    reasons = missed(remarks)
    assert named in reasons and words in reasons[named], reasons
    assert after.digest() == model.digest() and not [r for r in remarks if r.kind == "applied"]


def narrow_heads() -> dict[str, Any]:
    """Four query heads of 6 channels: only a Hadamard matrix of order 2 divides that."""
    rng, held = np.random.default_rng(0), streams.constants()
    held |= {n: rng.standard_normal(s).astype(np.float32) for n, s in {"wq": (32, 24), "wo": (24, 32), "bq": (24,)}.items()}
    held |= {n: rng.standard_normal(s).astype(np.float32) for p in "kv" for n, s in ((f"w{p}", (32, 12)), (f"b{p}", (12,)))}
    return held | {"by_q": np.array([0, 0, 4, 6]), "by_kv": np.array([0, 0, 2, 1, 6]), "merged": np.array([0, 0, 24]),
                   "grouped": np.array([0, streams.TOKENS, 4, 6])}  # fmt: skip


def odd_hidden() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"w1": (32, 50), "c1": (50,), "w2": (50, 32)}
    return streams.constants() | {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


@pytest.mark.parametrize(
    ("model", "spec", "named", "words"),
    [
        (streams.block(form="cache"), "rotate{r1=false}", "pv", "v is the graph output v8"),
        (streams.block(weights=narrow_heads()), "rotate{r1=false}", "pv", "no Hadamard block divides its heads of 6 channels"),
        (
            streams.block(weights=odd_hidden()),
            "rotate{r1=false r2=false r4=block}",
            "fc2",
            "no Hadamard block of 16 or more divides",
        ),
    ],
)
def test_values_and_hidden_layers_that_stay(model: Model, spec: str, named: str, words: str) -> None:
    model = canonical(model)
    after, remarks = rotated(model, spec)
    reasons = missed(remarks)
    assert named in reasons and words in reasons[named], reasons
    assert after.digest() == model.digest() and not [r for r in remarks if r.kind == "applied"]


@pytest.mark.parametrize(
    ("spec", "keep", "named"), [("rotate{r1=false}", "out", "pv"), ("rotate{r1=false r2=false r4=block}", "fc2", "fc2")]
)
def test_selected_values_and_hidden_layers_stay(spec: str, keep: str, named: str) -> None:
    model = canonical(streams.block())
    after, remarks = rotated(model, spec, keep_float=(keep,))
    assert "--keep-float" in missed(remarks)[named] and after.digest() == model.digest()


def test_post_norm_bert_is_refused() -> None:
    done = fixture_step("hf_bert_shared_ts14", "rotate{r2=false}", "trt")
    assert not done.changed and any("post-norm" in r.reason for r in done.report.remarks if r.kind == "missed")


def test_an_rms_norm_keeps_its_mean() -> None:
    plain, _ = rotated(streams.block("rms"), "rotate{r2=false}")
    folded, _ = rotated(streams.block("rms"), "rotate{r2=false mean=fold}")
    assert plain.digest() == folded.digest()


def test_selected_layers_stop_the_whole_stream() -> None:
    _, remarks = rotated(streams.block(), "rotate{r2=false}", keep_float=("fc1",))
    assert "a stream is rotated whole or not at all" in "".join(missed(remarks).values())


def test_seeds_give_other_rotations_and_the_same_bytes() -> None:
    first, again, other = (rotated(streams.block(), f"rotate{{seed={s}}}")[0].digest() for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("channels", [16, 40, 60, 92])
@pytest.mark.parametrize("keep_mean", [True, False])
@pytest.mark.parametrize("klt", [True, False])
def test_stream_rotations_are_orthogonal(channels: int, keep_mean: bool, klt: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, channels)) * np.exp(rng.standard_normal(channels))
    r = stream_rotation(channels, rng, keep_mean, x.T @ x if klt else None)
    assert np.abs(r @ r.T - np.eye(channels)).max() < 1e-12
    assert not keep_mean or np.abs(r.sum(1) - 1).max() < 1e-12


def test_klt_gives_all_channels_one_energy() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 64)) @ rng.standard_normal((64, 64)) * np.exp(2 * rng.standard_normal(64))
    centred = x - x.mean(1, keepdims=True)
    for rows, keep in ((x, False), (centred, True)):
        energy = np.square(rows @ stream_rotation(64, rng, keep, rows.T @ rows)).sum(0)
        assert energy.max() / energy.min() <= 1 + 1e-9


def test_klt_gives_the_values_of_a_head_and_the_hidden_blocks_one_energy() -> None:
    after, _ = rotated(streams.block(), "rotate{r1=false r4=block kind=klt}")
    exposed = after.clone()
    exposed.graph.outputs.clear()
    for name in ("v_bias", "fc2_rotation"):
        exposed.graph.outputs.append(next(n for n in exposed.graph if n.name == name).outputs[0])
    values, hidden = outputs(exposed, streams.feeds())
    for rows in (*np.split(values.reshape(-1, 16), 2, axis=1), hidden.reshape(-1, hidden.shape[-1])):
        energy = np.square(rows.astype(np.float64)).sum(0)
        assert energy.max() / energy.min() <= 1 + 1e-5, "float32"


def test_the_best_of_several_draws_is_kept() -> None:
    _, remarks = rotated(streams.block(), "rotate{r2=false search=5}", scheme="w4a4")
    (numbers,) = [r.numbers for r in remarks if r.kind == "applied"]
    assert numbers["draws"] == 5 and numbers["gain_over_median_db"] >= 0


def test_rotate_then_smooth_folds_into_the_free_gain() -> None:
    ctx, feeds = context("trt"), streams.feeds()
    model = streams.block()
    for spec in ("rotate,smooth{always}", "rotate{mean=fold},smooth{always}"):
        after, reports = pipeline(spec, model, feeds, ctx)
        smoothed = next(r for r in reports if r.spec == "smooth{always}")
        assert [r for r in smoothed.remarks if r.kind == "applied" and "norm site" in r.reason]
        assert sqnr_db(outputs(model, feeds)[0], outputs(after, feeds)[0]) > 20


def test_char_gpt_gains_at_4_bits() -> None:
    model = Model.load(ROOT / "models/char_gpt.onnx")
    with np.load(ROOT / "models/char_gpt.calib.npz") as data:
        feeds, held = {"input_ids": data["input_ids"][:8]}, {"input_ids": data["input_ids"][-8:]}
    found = {}
    for spec in ("", "rotate{r4=block}"):
        after, _ = pipeline(spec, model, feeds, context("ort", "w4a4"))
        found[spec] = sqnr_db(outputs(model, held)[0], outputs(after, held)[0])
    assert found["rotate{r4=block}"] > found[""]
