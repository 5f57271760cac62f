"""Which attention blocks become one kernel: what is said is what the builder does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from qcompile.backend.audit import AuditResult, audit
from qcompile.backend.groups import qdq_groups, without
from qcompile.backend.profile import parse_profile
from qcompile.decide.placement import Placement
from qcompile.ir.model import Model
from qcompile.ir.select import Selection
from qcompile.quant.spec import SCHEMES
from qcompile.target.catalog import TARGETS
from qcompile.target.target import Choices
from qcompile.target.tensorrt.fusion import BlockFacts, obstacles
from qcompile.target.view import GraphView
from tests.backend.unusual import cache
from tests.target.graphs import AttentionForm, attention

INT8 = AttentionForm()
FP8 = AttentionForm(kind="float8e4m3fn", softmax_scale=1 / 448)
HALF = AttentionForm(frozenset())
FORMS: list[tuple[AttentionForm, str]] = [
    *((replace(INT8, head=h), "") for h in (16, 32, 64)),
    *((replace(INT8, head=h), f"head size is {h}: INT8") for h in (24, 48, 72)),
    (replace(INT8, tokens=512), ""),
    (replace(INT8, tokens=520), "up to 520 keys: INT8 kernels end at 512"),
    (replace(INT8, tokens=1), "one query"),
    (replace(INT8, output=False), "output is not quantized"),
    (replace(INT8, guard=True), "IsNaN"),
    (replace(INT8, softcap=True), "Tanh"),
    (replace(INT8, scores=True), "scores are quantized"),
    (AttentionForm(frozenset("qk")), "of q, k, softmax and v only q, k are quantized"),
    (replace(FP8, head=72), ""),
    (replace(FP8, output=False), ""),
    (replace(FP8, head=264), "head size is 264: FP8"),
    (replace(FP8, tokens=24), "as few as 24 keys: FP8"),
    (replace(FP8, guard=True), "IsNaN"),
    (replace(HALF, head=72), ""),
    (replace(HALF, guard=True), ""),
    (replace(HALF, head=8), "head size is 8: float16"),
    (replace(HALF, head=20), ""),
    (replace(HALF, softcap=True), "Tanh"),
]


def name(value: object) -> str:
    """The test's: what differs from the plain form."""
    if not isinstance(value, AttentionForm):
        return str(value)
    told = {k: v for k, v in vars(value).items() if v != vars(INT8)[k] and k != "kind"}
    return " ".join([value.kind, *(f"{k}={_text(v)}" for k, v in told.items())])


def _text(value: object) -> str:
    return "".join(sorted(map(str, value))) if isinstance(value, frozenset) else str(value)


def audited(model: onnx.ModelProto, folder: Path, profile: str = "") -> AuditResult:
    pytest.importorskip("tensorrt_rtx")
    onnx.save(model, str(folder / "m.onnx"))
    return audit(folder / "m.onnx", profile=parse_profile(profile) if profile else None)


@pytest.mark.rtx
@pytest.mark.parametrize(("form", "reason"), FORMS, ids=name)
def test_every_unfused_block_has_its_reason(form: AttentionForm, reason: str, tmp_path: Path) -> None:
    result = audited(attention(form, batch=2), tmp_path)
    assert result.attention == (1, 0 if reason else 1)
    assert [u.node for u in result.unfused] == (["n_p"] if reason else [])
    assert all(reason in u.reason and ";" not in u.reason.replace("; in float16", "") for u in result.unfused)


@pytest.mark.rtx
def test_the_profile_decides(tmp_path: Path) -> None:
    model = attention(replace(INT8, tokens="n"), batch=2)
    assert audited(model, tmp_path, "x:2x8x128,2x64x128,2x512x128").attention == (1, 1)
    (block,) = audited(model, tmp_path, "x:2x8x128,2x64x128,2x600x128").unfused
    assert "up to 600 keys" in block.reason


@pytest.mark.rtx
def test_float32(tmp_path: Path) -> None:
    (block,) = audited(cache(), tmp_path).unfused
    assert block.reason.startswith("it is computed in float32")


def test_float16_is_no_way_out_where_it_would_not_fuse_either() -> None:
    assert next(obstacles(BlockFacts("int8", head=40))).endswith("--keep-float its MatMul)")
    assert not any("float16" in text for text in obstacles(BlockFacts("int8", head=320)))
    assert any("one size" in text for text in obstacles(BlockFacts(None, head=64, value_head=32)))


def placed(form: AttentionForm, scheme: str, folder: Path, asked: str = "auto", quantize: tuple[str, ...] = ()) -> Placement:
    """What the placement says of the block without its Q/DQ."""
    view = GraphView.open(attention(form, batch=2))
    plain = onnx.shape_inference.infer_shapes(without(view, qdq_groups(view)))
    onnx.save(plain, str(folder / "m.onnx"))
    return TARGETS["rtx"].place(Model.load(folder / "m.onnx"), SCHEMES[scheme], Selection(quantize=quantize), Choices(asked))


@pytest.mark.parametrize(
    ("form", "scheme", "reason"),
    [
        (replace(INT8, head=24), "w8a8", "its head size is 24: INT8 kernels have 16, 32 and 64"),
        (replace(INT8, tokens=520), "w8a8", "it has up to 520 keys: INT8 kernels end at 512"),
        (replace(INT8, tokens=1), "w8a8", "it has one query: INT8 kernels begin at 2"),
        (replace(INT8, guard=True), "w8a8", "the probabilities pass IsNaN and Where"),
        (replace(INT8, tokens=24), "fp8", "it has as few as 24 keys: FP8 kernels begin at 32"),
    ],
)
def test_what_float16_alone_fuses_stays_in_float16(form: AttentionForm, scheme: str, reason: str, tmp_path: Path) -> None:
    out = placed(form, scheme, tmp_path)
    missed = [(node, text) for node, text in out.missed if "float16 it is one kernel" in text]
    assert {node for node, _ in missed} == {"n_scores", "n_o"} and all(text.startswith(reason) for _, text in missed)
    assert not {str(p.node.name) for p in out.points} & {"n_scores", "n_o"} and not out.notes
    forced = placed(form, scheme, tmp_path, "all")
    assert [text for _, text in forced.notes if text.startswith(f"this attention will not be one kernel: {reason}")]


@pytest.mark.parametrize(("form", "scheme"), [(INT8, "w8a8"), (replace(INT8, head=24), "fp8"), (replace(INT8, head=24), "w4a4")])
def test_what_fuses_is_quantized(form: AttentionForm, scheme: str, tmp_path: Path) -> None:
    out = placed(form, scheme, tmp_path, quantize=("n_y",))
    assert {"n_scores", "n_o"} <= {str(p.node.name) for p in out.points} and not out.notes


def test_what_fuses_nowhere_is_quantized_all_the_same(tmp_path: Path) -> None:
    """Head size 8 and 320: no fused kernel of any type, and INT8 products are the faster ones."""
    for head in (8, 320):
        out = placed(replace(INT8, head=head), "w8a8", tmp_path)
        assert "n_scores" in {str(p.node.name) for p in out.points}
        assert [text for node, text in out.notes if node == "n_scores" and f"head size is {head}" in text]


def test_the_output_gets_codes_of_its_own_where_nothing_behind_reads_any(tmp_path: Path) -> None:
    """The projection here is the last layer, which stays in float."""
    own = [p for p in placed(INT8, "w8a8", tmp_path).points if p.slot < 0]
    assert [(str(p.node.name), p.slot) for p in own] == [("n_o", -1)]
    assert not [p for p in placed(INT8, "w8a8", tmp_path, quantize=("n_y",)).points if p.slot < 0]
