"""Decoders with a cache: run on their own past, the runs calibrate them, and RTX builds what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qcompile.backend.audit import audit
from qcompile.errors import DataError, ModelError
from qcompile.verbs.compile.options import Options
from qcompile.verbs.compile.run import compile
from qcompile.verbs.decode import DecodeOptions, decode
from tests.verbs.decoders import decoder, prompts

KINDS = ("llama", "qwen", "whisper", "t5")


def written(kind: str, folder: Path, **options: Any) -> Path:
    """The model, and beside it the runs of two prompts of ten tokens and three steps."""
    model = folder / f"{kind}.onnx"
    onnx.save(decoder(kind), str(model))
    np.savez(folder / "prompts.npz", **prompts(kind, count=2))
    decode(model, DecodeOptions(data=str(folder / "prompts.npz"), steps=3, **options))
    return model


def runs_of(model: Path) -> list[dict[str, Any]]:
    return [dict(np.load(p)) for p in sorted(model.with_suffix(".calib").iterdir())]


@pytest.mark.parametrize("kind", KINDS)
def test_the_runs_are_those_of_real_decoding(kind: str, tmp_path: Path) -> None:
    """Prompt and steps; what the caches hold is what the whole text gives in one run."""
    model = written(kind, tmp_path)
    runs = runs_of(model)
    assert [r["input_ids"].shape[1] for r in runs] == [10, 1, 1, 1] * 2
    assert [r["attention_mask"].shape[1] for r in runs] == [10, 11, 12, 13] * 2
    text = np.concatenate([r["input_ids"] for r in runs[:4]], axis=1)
    session = ort.InferenceSession(str(model))
    whole = {**runs[0], "input_ids": text, "attention_mask": np.ones_like(text)}
    presents = session.run([n for n in (o.name for o in session.get_outputs()) if "present" in n], whole)
    pasts = [runs[3][n] for n in runs[3] if "past" in n]
    assert all(np.allclose(a[:, :, :12], b, atol=1e-4) for a, b in zip(presents, pasts, strict=True))
    (logits,) = session.run(["logits"], runs[2])
    assert runs[3]["input_ids"].item() == logits[0, -1].argmax()


def test_the_runs_without_a_past_may_be_left_out(tmp_path: Path) -> None:
    runs = runs_of(written("llama", tmp_path, skip_prompt=True))
    assert [r["past_key_values.0.key"].shape[2] for r in runs] == [10, 11, 12] * 2


def test_nothing_is_half_written_or_written_over(tmp_path: Path) -> None:
    model = written("llama", tmp_path)
    with pytest.raises(DataError, match="exists; remove it"):
        decode(model, DecodeOptions(data=str(tmp_path / "prompts.npz")))
    np.savez(tmp_path / "other.npz", ids=np.zeros((2, 4), np.int64))
    with pytest.raises(DataError, match="input_ids"):
        decode(model, DecodeOptions(data=str(tmp_path / "other.npz"), output=tmp_path / "new"))
    assert {p.name for p in tmp_path.iterdir()} == {"llama.onnx", "llama.calib", "prompts.npz", "other.npz"}


def test_a_model_without_a_cache_is_told_so(tmp_path: Path) -> None:
    info = onnx.helper.make_tensor_value_info
    ends = [info(n, onnx.TensorProto.FLOAT, ["N", 4]) for n in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=opsets), str(tmp_path / "m.onnx"))
    with pytest.raises(ModelError, match="keeps no cache"):
        decode(tmp_path / "m.onnx", DecodeOptions(data="random"))


@pytest.mark.rtx
@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_is_compiled_built_and_audited(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    made = compile(written(kind, tmp_path), Options(target="rtx", passes="", output=tmp_path / "q.onnx"))
    assert made.sqnr_db is not None and made.sqnr_db > 20
    result = audit(tmp_path / "q.onnx", "sm89")
    assert result.share == 1.0 and result.coverage is not None and result.coverage >= 0.9
    assert result.attention[0] == result.attention[1] > 0
