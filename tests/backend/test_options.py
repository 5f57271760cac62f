"""Build options: what is asked of the module, and who refuses what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qcompile.backend import options as options_module
from qcompile.backend.options import BuildOptions, require_options
from qcompile.backend.worker import builder_config, config_options, header_state, unsupported
from qcompile.errors import BackendError
from tests.backend.fakes import fake_trt

EVERYTHING = BuildOptions(Path("t.cache"), True, "ampere+", True, True)


def asked(options: BuildOptions) -> dict[str, Any]:
    cache = options.timing_cache
    return {**vars(options), "timing_cache": None if cache is None else str(cache)}


def test_defaults_ask_for_nothing() -> None:
    assert BuildOptions().chosen == () and BuildOptions().flags == ("STRONGLY_TYPED",)
    assert unsupported(fake_trt("STRIP_PLAN", "REFIT", "HardwareCompatibilityLevel"), asked(BuildOptions())) == []
    assert config_options(fake_trt(), asked(BuildOptions())) == {"profiling_verbosity": "detailed"}


def test_every_option_reaches_polygraphy(tmp_path: Path) -> None:
    cache = tmp_path / "t.cache"
    options = replace(EVERYTHING, timing_cache=cache)
    assert "load_timing_cache" not in config_options(fake_trt(), asked(options))
    cache.write_bytes(b"")
    assert config_options(fake_trt(), asked(options)) == {
        "profiling_verbosity": "detailed",
        "version_compatible": True,
        "hardware_compatibility_level": "AMPERE_PLUS",
        "strip_plan": True,
        "refittable": True,
        "load_timing_cache": str(cache),
    }
    request = {"rtx": False, "profiles": [{"x": [[1, 4], [2, 4], [3, 4]]}], "options": asked(options)}
    functor = builder_config(fake_trt(), request)
    assert functor.version_compatible and functor.strip_plan and functor.refittable
    assert functor.hardware_compatibility_level == "AMPERE_PLUS" and functor.timing_cache_path == str(cache)
    assert functor.profiles[0]["x"].max == (3, 4)


@pytest.mark.parametrize(
    ("lacking", "named"),
    [
        ("VERSION_COMPATIBLE", "version_compatible"),
        ("STRIP_PLAN", "strip"),
        ("REFIT", "refit"),
        ("AMPERE_PLUS", "hardware_compatible"),
        ("HardwareCompatibilityLevel", "hardware_compatible"),
        ("timing_cache", "timing_cache"),
    ],
)
def test_what_a_module_lacks_is_named(lacking: str, named: str) -> None:
    assert unsupported(fake_trt(), asked(EVERYTHING)) == []
    assert unsupported(fake_trt(lacking), asked(EVERYTHING)) == [named]


def test_a_stripped_plan_is_refittable() -> None:
    assert BuildOptions(strip=True).flags == ("STRONGLY_TYPED", "STRIP_PLAN", "REFIT")
    assert config_options(fake_trt(), asked(BuildOptions(strip=True)))["refittable"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (BuildOptions(timing_cache=Path("t")), "no timing cache.*drop --timing-cache"),
        (BuildOptions(version_compatible=True), "lean runtime.*drop --version-compatible"),
        (BuildOptions(hardware_compatible="same-cc"), "write --gpu sm86,sm89"),
        (BuildOptions(strip=True), "this machine has no GPU; drop --strip"),
        (BuildOptions(refit=True), "this machine has no GPU; drop --refit"),
    ],
)
def test_what_rtx_cannot_take(options: BuildOptions, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "local_gpu", lambda: None)
    with pytest.raises(BackendError, match=match):
        require_options("rtx", options)
    require_options("trt", options)


def test_rtx_strips_where_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "local_gpu", lambda: "sm89")
    require_options("rtx", BuildOptions(strip=True, refit=True))


@pytest.mark.parametrize(
    ("state", "bits", "said"),
    [
        ("VALID", 0, "valid"),
        ("SUBOPTIMAL", 0, "suboptimal"),
        ("INVALID", 0, "well-formed"),
        ("INVALID", 64, "well-formed"),
        ("INVALID", 32, "malformed_engine"),
        ("INVALID", 3, "version_mismatch, unsupported_cc"),
    ],
)
def test_header(state: str, bits: int, said: str) -> None:
    names = ("VERSION_MISMATCH", "UNSUPPORTED_CC", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME", "INSUFFICIENT_GPU_MEMORY")
    reasons = {n: 1 << i for i, n in enumerate((*names, "MALFORMED_ENGINE", "CUDA_ERROR"))}
    verdict = SimpleNamespace(name=state)
    trt = fake_trt()
    trt.ILogger = type("ILogger", (), {})
    trt.Runtime = lambda logger: SimpleNamespace(get_engine_validity=lambda data: (verdict, bits))
    trt.Runtime.get_engine_validity = None
    trt.EngineValidity = SimpleNamespace(INVALID=verdict if state == "INVALID" else None)
    trt.EngineInvalidityDiagnostics = SimpleNamespace(__members__=reasons)
    assert header_state(trt, b"engine") == said
    assert header_state(fake_trt(), b"engine") is None
