"""Which attention blocks become one kernel: what is said is what the builder does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from qcompile.backend.audit import AuditResult, audit
from qcompile.backend.groups import qdq_groups, without
from qcompile.backend.profile import parse_profile
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


@pytest.mark.parametrize(
    ("form", "scheme", "foreseen"),
    [
        (INT8, "w8a8", ""),
        (INT8, "w8a8", "output"),  # the last layer stays in float
        (replace(INT8, head=24), "w8a8", "head size is 24"),
        (replace(INT8, tokens=520), "w8a8", "520 keys"),
        (replace(INT8, guard=True), "w8a8", "IsNaN"),
        (replace(INT8, head=24), "fp8", ""),
        (replace(INT8, head=24), "w4a4", ""),
    ],
)
def test_what_is_known_beforehand_is_a_remark(form: AttentionForm, scheme: str, foreseen: str, tmp_path: Path) -> None:
    view = GraphView.open(attention(form, batch=2))
    plain = onnx.shape_inference.infer_shapes(without(view, qdq_groups(view)))
    onnx.save(plain, str(tmp_path / "m.onnx"))
    loaded, asked = Model.load(tmp_path / "m.onnx"), Selection(quantize=() if foreseen == "output" else ("n_y",))
    notes = TARGETS["rtx"].place(loaded, SCHEMES[scheme], asked, Choices()).notes
    assert [node for node, _ in notes] == (["n_scores"] if foreseen else [])
    assert all(foreseen in text and text.startswith("this attention will not be one kernel") for _, text in notes)
