"""Pages of the guide that show whole programs: their files written out, their commands run, as a reader would."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"`([\w/]+\.\w+)`[^`]*\Z")
_CHANGING = (r"\d+\.\d s\b", r"(\d+\.\d+ +)?\d+ MB\b", r"step before +\S+", r"\d+\.\d dB")


@dataclass(frozen=True)
class Page:
    """A page below docs/."""

    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def blocks(self, language: str) -> list[str]:
        """Blocks of a language, without what they are indented by."""
        found = (m for m in _BLOCK.finditer(self.text) if m[2] == language)
        return [re.sub(f"^{m[1]}", "", m[3], flags=re.MULTILINE) for m in found]

    def files(self) -> dict[str, str]:
        """What the page calls a file: a block of code behind a sentence that ends with the file's name."""
        named = ((_NAME.search(self.text[: m.start()].rstrip()), m) for m in _BLOCK.finditer(self.text))
        return {name[1]: m[3] for name, m in named if name is not None and m[2] in ("python", "toml")}

    def install(self, folder: Path) -> None:
        """Write the files, and what `pip install -e` would add: the entry points."""
        files = self.files()
        about = tomllib.loads(files["pyproject.toml"])["project"]
        info = folder / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
        groups = [f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in e.items()) for g, e in about["entry-points"].items()]
        files[f"{info.name}/METADATA"] = f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n"
        files[f"{info.name}/entry_points.txt"] = "\n".join(groups)
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "models").symlink_to(ROOT / "models")

    def transcripts(self) -> list[tuple[str, str]]:
        """(command, output) of every command that is shown."""
        parts = (part for block in self.blocks("console") for part in re.split(r"^\$ ", block, flags=re.MULTILINE) if part)
        return [(command, output.strip()) for command, _, output in (part.partition("\n") for part in parts)]


def run(command: str, folder: Path, *, code: int | None = None) -> str:
    """What a command of the guide prints, with `folder` installed."""
    words = shlex.split(command)
    program = {"qcompile": [sys.executable, "-m", "qcompile"], "python": [sys.executable]}[words[0]]
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "NO_COLOR": "1"}
    done = subprocess.run([*program, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True)
    assert code is None or done.returncode == code, done.stderr
    return "\n".join(line.rstrip() for line in (done.stderr + done.stdout).strip().splitlines())


def shows(shown: str, printed: str) -> bool:
    """Whether a page shows what was printed, `...` for lines that it leaves out; numbers that differ by machine do not count."""
    parts = (re.escape(part) for part in constant(f"{shown}\n").split("...\n"))
    return re.fullmatch("(.*\n)*?".join(parts), constant(f"{printed}\n")) is not None


def constant(text: str) -> str:
    """Without what differs from run to run and machine to machine: times, memory, rounding noise, widths of columns."""
    for pattern in _CHANGING:
        text = re.sub(pattern, "#", text)
    return re.sub(r"[ \t]+", " ", text)
