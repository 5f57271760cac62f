"""The guide's table of JSON keys, held to the documents that the commands print."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qcompile.cli import main
from qcompile.verbs.bench.engines import BenchedEngines
from qcompile.verbs.build import Refitted
from tests.cli.test_cli import CNN, EVAL, ROOT, Capture, document
from tests.verbs.decoders import decoder, prompts
from tests.verbs.test_inspect import engine

GUIDE = ROOT / "docs" / "guide" / "commands.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ORT model, an integer-only one, statistics of two shards, an engine's manifest, and a decoder with a prompt."""
    made = tmp_path_factory.mktemp("documents")
    for target, name in (("ort", "q.onnx"), ("integer", "i.onnx")):
        assert main([str(CNN), "--target", target, "--samples", "8", "-o", str(made / name)]) == 0
    for part in (1, 2):
        words = ("calibrate", CNN, "--target", "ort", "--samples", 128, "--shard", f"{part}/2", "-o", made / f"{part}.qstats")
        assert main([str(w) for w in words]) == 0
    engine(made)
    onnx.save(decoder("llama"), str(made / "llama.onnx"))
    np.savez(made / "prompts.npz", **prompts("llama", count=1, length=2))
    return made


def promised(command: str) -> set[str]:
    """The top-level keys of the command's row: not those in brackets or behind `of`, which say what a key holds."""
    table = GUIDE.read_text(encoding="utf-8").partition("| command | keys |")[2]
    (row,) = re.findall(rf"^\| (?:`\w+`, )*`{re.escape(command)}`(?:, `\w+`)* \| (.*) \|$", table, re.M)
    shown = re.sub(r"\([^()]*\)|\bof `[^`]*`", "", row)
    return {key for words in re.findall(r"`([^`]*)`", shown) for key in words.split(", ") if key.isidentifier()}


COMMANDS: dict[str, list[tuple[Any, ...]]] = {
    "compile": [(CNN, "--target", "ort", "--samples", 8, "-o", "{}/o.onnx")],
    "compile --dry-run": [(CNN, "--target", "ort", "--samples", 8, "--dry-run")],
    "eval": [
        ("eval", CNN, "{}/q.onnx", "--data", EVAL, "--samples", 4, "--per-layer"),
        ("eval", "{}/i.onnx", "--data", EVAL, "--samples", 4, "--oracle"),
    ],
    "calibrate": [("calibrate", CNN, "--target", "ort", "--samples", 8, "-o", "{}/s.qstats")],
    "merge": [("merge", "{}/1.qstats", "{}/2.qstats", "-o", "{}/all.qstats")],
    "bench": [("bench", CNN, "{}/q.onnx", "--runs", 2)],
    "check": [
        ("check", "{}/i.onnx", "--target", "integer"),
        ("check", "{}/q.onnx", "--target", "ort", "--fix", "-o", "{}/fixed.onnx"),
    ],
    "decode": [("decode", "{}/llama.onnx", "--data", "{}/prompts.npz", "--steps", 1)],
    "export-integer": [("export-integer", "{}/i.onnx", "-o", "{}/i.json")],
    "inspect": [("inspect", CNN), ("inspect", "{}/m.engine")],
    "deploy": [
        ("deploy", CNN, "--triton", "{}/repo", "--samples", 2),
        ("deploy", CNN, "{}/q.onnx", "--triton", "{}/both", "--samples", 2),
    ],
    "passes": [("passes",), ("passes", "smooth")],
}
UNSEEN = {"compile": {"engine"}, "bench": {*BenchedEngines.__dataclass_fields__}}  # of options that need a builder or a GPU


@pytest.mark.parametrize("command", COMMANDS)
def test_the_guide_names_the_keys(command: str, folder: Path, capsys: Capture) -> None:
    words = ([str(w).replace("{}", str(folder)) for w in line] for line in COMMANDS[command])
    found = set[str]().union(*(document(capsys, *line) for line in words)) - {"schema_version"}
    assert promised(command) == found | UNSEEN.get(command, set())


def test_the_guide_names_the_keys_of_a_refitted_engine(tmp_path: Path) -> None:
    (tmp_path / "e").write_bytes(b"")
    assert promised("refit") == {*Refitted(tmp_path / "e", tmp_path, tmp_path).to_json()} - {"schema_version"}


@pytest.mark.rtx
def test_the_guide_names_the_keys_of_engines(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("tensorrt_rtx")
    model, out = tmp_path / "q.onnx", tmp_path / "q.engine"
    assert main([str(CNN), "--target", "rtx", "--samples", "8", "-o", str(model)]) == 0
    capsys.readouterr()
    assert promised("audit") == {*document(capsys, "audit", model)} - {"schema_version"}
    assert promised("build") == {*document(capsys, "build", model, "-o", out)} - {"schema_version"}
