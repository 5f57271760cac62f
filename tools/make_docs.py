"""Write docs/passes/ (one page a pass), docs/guide/options.md (of commands) and docs/guide/rules.md (the rules of `check`).

python tools/make_docs.py            write the pages
python tools/make_docs.py --check    fail if a page is missing or differs
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import click

from qcompile.cli.app import COMMANDS
from qcompile.pipeline import registry
from qcompile.pipeline.describe import PassHelp, describe_pass
from qcompile.target.findings import Rule
from qcompile.target.integer.rules import INTEGER_RULES
from qcompile.target.ort.rules import ORT_RULES
from qcompile.target.tensorrt.accepted import ACCEPTED
from qcompile.target.tensorrt.rules import TRT_RULES

DOCS = Path(__file__).parents[1] / "docs"
RULES_PAGE = "guide/rules.md"
OPTIONS_PAGE = "guide/options.md"
OPTIONS_NOTE = "<!-- made by tools/make_docs.py from the options of the verbs: change them there -->\n"
RULES_NOTE = "<!-- made by tools/make_docs.py from qcompile/target: change it there -->\n"
EFFECTS = {"refused": "no engine", "float": "runs in float", "wrong": "wrong numbers", "notice": "builds"}
NOTE = "<!-- made by tools/make_docs.py from the pass's docstring: change it there -->\n"


def page(p: PassHelp) -> str:
    """The page of one pass."""
    facts = [f"* kind: {p.kind}"]
    facts += [f"* needs: a {p.needs} model" + (f", behind {', '.join(p.after)}" if p.after else "")]
    facts += [f"* makes it: {p.reaches}"] if p.reaches is not None else []
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


def rules_page() -> str:
    """Every rule of the checker, and what people ask about that is no rule."""
    intro = (
        "`qcompile check` applies these rules. An *error* is refused by the backend, runs in float although it is quantized,\n"
        "or computes something else; a *warning* is about speed, accuracy or other versions. `--fix -o FIXED.onnx` can repair\n"
        "the rules marked so; `--sarif FILE` writes the findings for code scanning.\n\n"
        "The TensorRT rules were measured with TensorRT for RTX 1.7.1 (built, not run): the tests build a graph for each row\n"
        "of the behaviour matrix and some hundred generated ones, and compare what the kernels read with what the rules say.\n"
    )
    accepted = [f"| {a.name} | {a.outcome} | {a.reason} |" for a in ACCEPTED]
    what = "Forms that people ask about and that no rule reports; each is built by the tests too.\n"
    parts = [RULES_NOTE, "# The rules of `qcompile check`\n", intro, "## TensorRT (`--target trt`, `--target rtx`)\n"]
    parts += [rules_table(TRT_RULES), "## ONNX Runtime (`--target ort`)\n", rules_table(ORT_RULES)]
    parts += ["## Integers only (`--target integer`, see [integer.md](integer.md))\n", rules_table(INTEGER_RULES)]
    parts += ["## No rule\n", what]
    return "\n".join([*parts, "| form | runs as | why there is no rule |", "| --- | --- | --- |", *accepted]) + "\n"


def rules_table(rules: tuple[Rule, ...]) -> str:
    """One row a rule."""
    head = "| rule | level | what is wrong | otherwise | what to do | `--fix` |\n| --- | --- | --- | --- | --- | --- |\n"
    return head + "".join(rule_row(r) for r in sorted(rules, key=lambda r: r.id))


def rule_row(r: Rule) -> str:
    """Id and title, severity, the check's documentation, the effect, the fix, and whether it is mechanical."""
    fixable = "yes" if r.repair is not None else ""
    return f"| {r.id} {r.title} | {r.severity} | {r.summary} | {EFFECTS[r.effect]} | {r.fix} | {fixable} |\n"


def commands_page() -> str:
    """The options of every command, in the groups of its help."""
    intro = "Options that may stand in `MODEL.qcompile.toml` too are told in [data.md](data.md).\n"
    return "\n".join([OPTIONS_NOTE, "# All options\n", intro, *(command_section(name) for name in COMMANDS)])


def command_section(name: str) -> str:
    """One command: its summary and a row an option."""
    command = importlib.import_module(f"qcompile.cli.{name.replace('-', '_')}").command
    rows = [command_row(p) for p in command.params if isinstance(p, click.Option)]
    return "\n".join(
        [f"## {name}\n", f"{COMMANDS[name]}\n", "| option | takes | default | what |", "| --- | --- | --- | --- |", *rows, ""]
    )


def command_row(option: click.Option) -> str:
    """Spelling, what it takes, default, help."""
    takes = "" if option.is_flag else option.make_metavar(click.Context(click.Command("qcompile")))
    default = f"`{option.default}`" if option.show_default else "must be given" if option.required else ""
    spelled = ", ".join(f"`{o}`" for o in option.opts)
    return f"| {spelled} | {takes.replace('|', ' or ')} | {default} | {(option.help or '').replace('|', ' or ')} |"


def pages() -> dict[str, str]:
    """File name below docs/ -> text."""
    passes = [describe_pass(name) for name in registry.names()]
    made = {f"passes/{p.name}.md": page(p) for p in passes}
    return made | {"passes/README.md": index(passes), RULES_PAGE: rules_page(), OPTIONS_PAGE: commands_page()}


def present() -> dict[str, str]:
    """The pages that are there now."""
    files = [*(DOCS / "passes").glob("*.md"), DOCS / RULES_PAGE, DOCS / OPTIONS_PAGE]
    return {str(f.relative_to(DOCS)): f.read_text(encoding="utf-8") for f in files if f.is_file()}


def main() -> int:
    """Write or check the pages; the number of stale ones decides the exit code of a check."""
    wanted = pages()
    have = present()
    stale = sorted(name for name in wanted.keys() | have.keys() if wanted.get(name) != have.get(name))
    if "--check" in sys.argv[1:]:
        if stale:
            print(f"docs/ is out of date ({', '.join(stale)}); run: make docs", file=sys.stderr)
        return int(bool(stale))
    for name in stale:
        target = DOCS / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(wanted[name], encoding="utf-8") if name in wanted else target.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
