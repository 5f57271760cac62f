"""Options of the verbs: one definition for the command line, the Python API, the sidecar file and the line that reproduces."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import click
import pytest

import qcompile
from qcompile.errors import UsageError
from qcompile.verbs.build import AuditOptions, EngineBuildOptions, RefitOptions
from qcompile.verbs.calibrate.options import CalibrateOptions, MergeOptions
from qcompile.verbs.check import CheckOptions
from qcompile.verbs.compile.options import Options
from qcompile.verbs.deploy.options import DeployOptions
from qcompile.verbs.evaluate.run import EvalOptions
from qcompile.verbs.inspect import InspectOptions
from qcompile.verbs.options import made, options_of, to_json, words

VERBS = {
    "compile": Options, "calibrate": CalibrateOptions, "merge": MergeOptions, "build": EngineBuildOptions, "audit": AuditOptions,
    "check": CheckOptions, "refit": RefitOptions, "inspect": InspectOptions, "deploy": DeployOptions, "eval": EvalOptions,
}  # fmt: skip


def sidecar(folder: Path, text: str) -> Path:
    (folder / "m.qcompile.toml").write_text(text)
    return folder / "m.onnx"


@pytest.mark.parametrize("verb", VERBS)
def test_the_command_has_every_option_of_the_verb(verb: str) -> None:
    command = importlib.import_module(f"qcompile.cli.{verb}").command
    flags = {flag: p for p in command.params if isinstance(p, click.Option) for flag in p.opts}
    for option in options_of(VERBS[verb]):
        assert option.help and flags[option.flag].help == option.help and flags[option.flag].required == option.required


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(UsageError, match="unknown option 'pases', did you mean 'passes'"):
        qcompile.compile("m.onnx", pases="repq")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"samples": 0}, "samples is 0; give at least 1"),
        ({"samples": "8"}, "samples cannot be '8'; it takes a whole number"),
        ({"verify": "never"}, "unknown verify 'never'"),
        ({"range": "mze"}, "unknown range 'mze', did you mean 'mse'"),
        ({"mem_limit": "4 apples"}, "is no size; write for example 4GiB"),
        ({"keep_float": 3}, "keep_float cannot be 3; it takes strings"),
        ({"exact": "yes"}, "exact cannot be 'yes'; it takes true or false"),
    ],
)
def test_values_are_checked(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        made(Options, given)


def test_a_missing_option_is_named() -> None:
    with pytest.raises(UsageError, match="'output' must be given"):
        made(MergeOptions, {})


def test_the_sidecar_says_what_is_not_given(tmp_path: Path) -> None:
    model = sidecar(
        tmp_path,
        'target = "ort"\nseed = 5\nkeep-float = ["fc*", "op:Conv"]\nmem_limit = "2GiB"\ncalib = "images"\nstats = "s.qstats"\n'
        'preprocess = "p.toml"\nverify = "off"\nstrict = true\nprofile = "x:1,2,3"\n',
    )
    found = made(Options, {"seed": 0, "verify": "each"}, model)
    assert found.target == "ort" and found.keep_float == ("fc*", "op:Conv") and found.mem_limit == 2 << 30 and found.strict
    assert found.seed == 0 and found.verify == "each", "what is given wins, also where it is the default"
    assert found.calib == str(tmp_path / "images") and found.stats == tmp_path / "s.qstats"
    assert found.preprocess == str(tmp_path / "p.toml") and found.profiles == ("x:1,2,3",)


def test_words_are_no_paths(tmp_path: Path) -> None:
    found = made(Options, {}, sidecar(tmp_path, 'calib = "random"\npreprocess = "imagenet"\n'))
    assert (found.calib, found.preprocess) == ("random", "imagenet")


def test_the_sidecar_of_a_compilation_serves_a_calibration(tmp_path: Path) -> None:
    model = sidecar(tmp_path, "min-sqnr = 20.0\nsamples = 8\n")
    assert made(CalibrateOptions, {}, model, keys=Options).samples == 8


@pytest.mark.parametrize("key", ["output", "engine", "report", "print-after"])
def test_what_belongs_to_one_command_is_not_taken_from_a_file(key: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"unknown key '{key}'"):
        made(Options, {}, sidecar(tmp_path, f'{key} = "x"\n'))


@pytest.mark.parametrize(
    ("text", "typed"),
    [('calib = "x.py:feed"', "--calib x.py:feed"), ('passes = "repq,x.py:change"', "--passes repq,x.py:change")],
)  # fmt: skip
def test_code_runs_only_where_it_is_typed(text: str, typed: str, tmp_path: Path) -> None:
    model = sidecar(tmp_path, text)
    with pytest.raises(UsageError, match=f"runs only where it is typed; if you trust it, add {typed}"):
        made(Options, {}, model)
    assert made(Options, {"calib": "random", "passes": "repq"}, model).calib == "random"


def test_words_say_the_same_again() -> None:
    options = Options(target="ort", samples=8, keep_float=("a", "b"), exact=True, seed=3)
    said = words(options, [f.name for f in dataclasses.fields(options)])
    assert said == ["--target", "ort", "--samples", "8", "--keep-float", "a", "--keep-float", "b", "--seed", "3", "--exact"]
    command = importlib.import_module("qcompile.cli.compile").command
    parsed = command.make_context("compile", ["m.onnx", *said]).params
    given = {o.name: parsed[o.name] for o in options_of(Options)}
    assert made(Options, {n: v for n, v in given.items() if v is not None}) == options


def test_the_document_holds_every_option() -> None:
    document = to_json(Options(output=Path("a/b.onnx"), bits=("fc=w4a4",)))
    assert set(document) == {o.name for o in options_of(Options)}
    assert document["output"] == "a/b.onnx" and document["bits"] == ["fc=w4a4"] and document["seed"] == 0


def test_refit_needs_an_engine_and_says_what_it_would_overwrite(tmp_path: Path) -> None:
    from qcompile.cli import main

    engine, model = tmp_path / "m.engine", tmp_path / "m.onnx"
    engine.write_bytes(b"no engine")
    model.write_bytes(b"model")
    assert main(["refit", str(engine), "--weights", str(model), "-o", str(model)]) == 2
    assert main(["refit", str(engine), "--weights", str(model), "-o", str(tmp_path / "out.engine")]) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.engine", "m.onnx"]
