"""Files appear whole or not at all, and replace nothing but files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qcompile.ir.atomic import atomic_file, beside, write_atomic


def test_a_link_is_written_through(tmp_path: Path) -> None:
    link, real = tmp_path / "link", tmp_path / "folder" / "real"
    real.parent.mkdir()
    real.write_text("old")
    link.symlink_to(real)
    write_atomic(link, "new")
    assert link.is_symlink() and real.read_text() == "new" and len(list(tmp_path.iterdir())) == 2


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="device, a pipe or a socket"):
        write_atomic(pipe, "text")
    assert pipe.is_fifo()


def test_leftovers_of_dead_processes_go(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    died = "import os, sys, pathlib as p\nfrom qcompile.ir.atomic import beside\nbeside(p.Path(sys.argv[1])).touch(); os._exit(1)"
    subprocess.run([sys.executable, "-c", died, str(out)], check=False)
    mine = beside(tmp_path / "other.onnx")
    mine.touch()
    assert len(list(tmp_path.iterdir())) == 2
    write_atomic(out, "text")
    assert sorted(tmp_path.iterdir()) == sorted((out, mine))


def test_long_names_have_temporary_files_too(tmp_path: Path) -> None:
    names = [tmp_path / ("n" * 200 + end) for end in ("a.onnx", "b.onnx")]
    assert beside(names[0]) != beside(names[1])
    with atomic_file(names[0]) as a, atomic_file(names[1]) as b:
        a.write(b"a")
        b.write(b"b")
    assert [n.read_text() for n in names] == ["a", "b"]
