"""Write docs/passes/: one page a pass, made from the pass's docstring and options.

python tools/make_docs.py            write the pages
python tools/make_docs.py --check    fail if a page is missing or differs
"""

from __future__ import annotations

import sys
from pathlib import Path

from qcompile.pipeline import registry
from qcompile.pipeline.describe import PassHelp, describe_pass

FOLDER = Path(__file__).parents[1] / "docs" / "passes"
NOTE = "<!-- made by tools/make_docs.py from the pass's docstring: change it there -->\n"


def page(p: PassHelp) -> str:
    """The page of one pass."""
    facts = [f"* kind: {p.kind}"]
    facts += [f"* {name}: {', '.join(held)}" for name, held in (("requires", p.requires), ("establishes", p.establishes)) if held]
    body = p.text.partition("\n")[2].strip()
    parts = [NOTE, f"# {p.name}\n", f"{p.help}\n", "\n".join(facts) + "\n"]
    if body:
        parts.append(f"```text\n{body}\n```\n")
    if p.options:
        parts.append(options(p))
    return "\n".join(parts)


def options(p: PassHelp) -> str:
    """The table of options."""
    defaults = ["-" if o.default is None else f"`{o.default}`" for o in p.options]
    rows = [f"| `{o.name}` | {o.takes} | {d} | {o.help} |" for o, d in zip(p.options, defaults, strict=True)]
    return "\n".join(["| option | takes | default | what |", "| --- | --- | --- | --- |", *rows]) + "\n"


def index(passes: list[PassHelp]) -> str:
    """The list of all passes."""
    kinds = (
        "EQUIVALENT passes keep the float function (checked), ANNOTATE passes only decide, FIT passes change values to lower\n"
        "the quantization error, LOWER passes bring in quantized arithmetic. `qcompile passes NAME` shows the same pages.\n"
    )
    rows = [f"| [{p.name}]({p.name}.md) | {p.kind} | {p.help} |" for p in passes]
    return "\n".join([NOTE, "# Passes\n", kinds, "| pass | kind | what |", "| --- | --- | --- |", *rows]) + "\n"


def pages() -> dict[str, str]:
    """File name -> text."""
    passes = [describe_pass(name) for name in registry.names() if name in registry.BUILTIN]
    return {f"{p.name}.md": page(p) for p in passes} | {"README.md": index(passes)}


def main() -> int:
    """Write or check the pages; the number of stale ones decides the exit code of a check."""
    wanted = pages()
    have = {f.name: f.read_text(encoding="utf-8") for f in FOLDER.glob("*.md")}
    stale = sorted(name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name))
    if "--check" in sys.argv[1:]:
        if stale:
            print(f"docs/passes is out of date ({', '.join(stale)}); run: make docs", file=sys.stderr)
        return int(bool(stale))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in stale:
        target = FOLDER / name
        target.write_text(wanted[name], encoding="utf-8") if name in wanted else target.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
