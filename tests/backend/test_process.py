"""Workers that answer, crash, are killed, or do not start."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from qcompile.backend import process
from qcompile.backend.process import ask_worker
from qcompile.errors import BackendError, BuildError


def ended(monkeypatch: pytest.MonkeyPatch, status: int, out: str = "", err: str = "") -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append(options)
        return subprocess.CompletedProcess(command, status, out, err)

    monkeypatch.setattr(process.subprocess, "run", run)
    return seen


@pytest.mark.parametrize(("target", "variable"), [("rtx", "1"), ("trt", "0")])
def test_an_answer(target: str, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = ended(monkeypatch, 0, '{"ok": true}')
    assert ask_worker("m", {"x": 1}, target) == {"ok": True}
    assert seen[0]["env"]["POLYGRAPHY_USE_TENSORRT_RTX"] == variable and seen[0]["input"] == '{"x": 1}'


@pytest.mark.parametrize(("status", "said"), [(-11, "signal 11"), (-6, "signal 6"), (0xC0000005, "status 0xc0000005")])
def test_a_crash_is_a_failed_build(status: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended(monkeypatch, status)
    with pytest.raises(BuildError, match=rf"the tensorrt_rtx library crashed \({said}\)"):
        ask_worker("m", {}, "rtx")


@pytest.mark.parametrize(("status", "said"), [(-9, "killed, as happens when memory runs out"), (1, "1: No module named x")])
def test_other_ends_are_not(status: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended(monkeypatch, status, err="Traceback\nNo module named x\n")
    with pytest.raises(BackendError, match=said) as caught:
        ask_worker("m", {}, "trt")
    assert not isinstance(caught.value, BuildError)
