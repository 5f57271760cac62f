"""Write docs/passes/ (one page a pass, see pass_facts.py), docs/guide/options.md (of commands), docs/guide/rules.md (the rules
of `check`) and docs/guide/targets.md.

python tools/make_docs.py            write the pages
python tools/make_docs.py --check    fail if a page is missing or differs
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import click
import pass_facts

from qcompile.cli.app import COMMANDS
from qcompile.pipeline import registry
from qcompile.pipeline.describe import PassHelp, describe_pass
from qcompile.quant.qtype import QType
from qcompile.quant.spec import SCHEMES, Scheme
from qcompile.target.catalog import TARGETS
from qcompile.target.findings import Rule
from qcompile.target.target import Target
from qcompile.target.tensorrt.accepted import ACCEPTED

DOCS = Path(__file__).parents[1] / "docs"
RULES_PAGE = "guide/rules.md"
OPTIONS_PAGE = "guide/options.md"
OPTIONS_NOTE = "<!-- made by tools/make_docs.py from the options of the verbs: change them there -->\n"
TARGETS_PAGE = "guide/targets.md"
RULES_NOTE = "<!-- made by tools/make_docs.py from qcompile/target: change it there -->\n"
EFFECTS = {"refused": "no engine", "float": "runs in float", "wrong": "wrong numbers", "notice": "builds"}
CODE = re.compile(r"(before|after): |\s+\S|\w+_c = ")
ITEM = re.compile(r"([\w, =-]{1,30}): ")
NEW = re.compile(r"Exact|Refuse|Skipped|Weight-side|Simulated|Zero points|Between|In front|Elsewhere")
NOTE = "<!-- made by tools/make_docs.py from the pass's docstring: change it there -->\n"


def page(p: PassHelp) -> str:
    """The page of one pass."""
    stages = [f"* kind: {p.kind}"]
    stages += [f"* needs: a {p.needs} model" + (f", behind {', '.join(p.after)}" if p.after else "")]
    stages += [f"* makes it: {p.reaches}"] if p.reaches is not None else []
    listed = "\n".join([*stages, *pass_facts.facts(p.name)])
    tail = [f"## In a compilation\n\n{listed}\n", f"## Options\n\n{options(p)}" if p.options else ""]
    parts = [NOTE, f"# {p.name}\n", f"{p.help}\n", prose(p), *tail]
    return "\n".join(filter(None, parts))


def prose(p: PassHelp) -> str:
    """The docstring behind its first line: what becomes what as it stands, what options do as a list, the rest as paragraphs."""
    lines = p.text.partition("\n")[2].strip("\n").splitlines()
    blocks = groupby(zip(paragraphs(p, lines), lines, strict=True), lambda pair: pair[0])
    return "\n".join(block(p, kind, [line for _, line in pairs]) for (kind, _), pairs in blocks)


def paragraphs(p: PassHelp, lines: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The kind of each line (code, item, text) and the number of its paragraph."""
    kind, number = "text", 0
    for line in lines:
        if CODE.match(line):
            kind, number = "code", number + (kind != "code")
        elif item(p, line):
            kind, number = "item", number + (kind != "item")
        elif kind == "code" or NEW.match(line):
            kind, number = "text", number + 1
        yield kind, number


def item(p: PassHelp, line: str) -> re.Match[str] | None:
    """A line that tells of an option or one of its values: `by=weights: text`."""
    known = {word for o in p.options for word in (o.name, *o.takes.split(" or "))}
    found = ITEM.match(line)
    return found if found and {*re.split(r", |=", found[1])} <= known else None


def block(p: PassHelp, kind: str, lines: Sequence[str]) -> str:
    """A paragraph in markdown; lines of a list start with a name, or go on."""
    if kind == "code":
        lines = ["```text", *lines, "```"]
    if kind == "item":
        lines = [re.sub(r"^([\w, =-]+):", r"* **\1**:", x) if item(p, x) else f"  {x}" for x in lines]
    return "\n".join(lines) + "\n"


def options(p: PassHelp) -> str:
    """The table of options."""
    defaults = ["-" if o.default is None else f"`{o.default}`" for o in p.options]
    rows = [f"| `{o.name}` | {o.takes} | {d} | {o.help} |" for o, d in zip(p.options, defaults, strict=True)]
    return "\n".join(["| option | takes | default | what |", "| --- | --- | --- | --- |", *rows]) + "\n"


def index(passes: list[PassHelp]) -> str:
    """The list of all passes."""
    kinds = (
        "EQUIVALENT passes keep the float function (checked), ANNOTATE passes only decide, FIT passes change values to lower\n"
        "the quantization error, LOWER passes bring in quantized arithmetic. `qcompile passes NAME` prints the docstring and\n"
        "the options.\n"
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
    parts = [RULES_NOTE, "# The rules of `qcompile check`\n", intro]
    for group in families():
        names = ", ".join(f"`--target {t.name}`" for t in group)
        parts += [f"## {group[0].title.partition(':')[0]} ({names})\n", rules_table(group[0].rules)]
    parts += ["## No rule\n", what]
    return "\n".join([*parts, "| form | runs as | why there is no rule |", "| --- | --- | --- |", *accepted]) + "\n"


def rules_table(rules: Sequence[Rule]) -> str:
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


def families() -> list[list[Target]]:
    """Targets that one folder defines stand together."""
    found: dict[str, list[Target]] = {}
    for target in TARGETS.values():
        found.setdefault(type(target).__module__, []).append(target)
    return list(found.values())


def targets_page() -> str:
    """What each target takes, from the targets themselves."""
    intro = (
        "*Simulated*: the codes are stored in int8 and limited to fewer bits. The numbers are right (ONNX Runtime gives the\n"
        "accuracy of such an engine), no speed is gained, and no engine is built. *Default* is the pipeline that runs without\n"
        "`--passes`. The opset is raised to the lowest one that the scheme needs on the target; graph inputs and outputs keep\n"
        "their types. What is quantized, and how that is changed: [placement.md](placement.md).\n"
    )
    parts = [RULES_NOTE, "# Targets and schemes\n", schemes_table(), intro]
    parts += [text for group in families() for text in family(group)]
    return "\n".join(parts)


def schemes_table() -> str:
    """Scheme by target."""
    head = ["scheme", "weights", "activations", *(f"`{name}`" for name in TARGETS)]
    rows = [
        [f"`{s.name}`", stored(s.weight, s), stored(s.activation, s), *(taken(t, s) for t in TARGETS.values())]
        for s in SCHEMES.values()
    ]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *rows))


def stored(qtype: QType | None, scheme: Scheme) -> str:
    """A type as the table says it."""
    if qtype is None:
        return scheme.body if scheme.weight is None else "float"
    return qtype.name.partition("@")[0] + (f", blocks of {scheme.block_size}" if scheme.block_size is not None else "")


def taken(target: Target, scheme: Scheme) -> str:
    """Whether a target runs a scheme."""
    if scheme.name not in target.schemes:
        return "no"
    lowest = max(
        target.capability(n) for n in (scheme.body, *(q.name for q in (scheme.weight, scheme.activation) if q is not None))
    )
    kernels = f"sm{lowest} and newer" if lowest else "yes"
    return "simulated" if scheme.simulated and not target.mixed_widths else kernels


def family(group: Sequence[Target]) -> list[str]:
    """A section: the facts of the targets of one folder, their pipelines, and where Q/DQ stand."""
    first, module = group[0], importlib.import_module(f"{type(group[0]).__module__.rpartition('.')[0]}.placement")
    title = ", ".join(f"`{t.name}`" for t in group)
    facts = [f"* `{t.name}`: {t.title}" + (f"; engines for {', '.join(t.gpus)}" if t.gpus else "") for t in group]
    codes = (", ".join(q.name for q in types) for types in (first.activations, first.weights))
    facts += ["* codes of activations: {}; of weights: {}".format(*codes)]
    facts += [
        "* zero points are 0" if first.symmetric else "* zero points are free",
        f"* opset {first.min_opset} to {first.max_opset}",
    ]
    facts += ["* the float rest and the scales are float16"] if first.half_body else []
    facts += ["* `--bits` gives layers widths of their own"] if first.mixed_widths else []
    facts += [f"* {len(first.rules)} rules of `qcompile check`: [rules.md](rules.md)"]
    facts += [f"* `{name}` on `{t.name}`: {text}" for t in group for name, text in t.caveats]
    text = (module.__doc__ or "").strip()
    return [f"## {title}\n", "\n".join(facts) + "\n", pipelines(first), f"```text\n{text}\n```\n"]


def pipelines(target: Target) -> str:
    """Default, forms and lowering by scheme; schemes of the same ones share a row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for scheme in (SCHEMES[name] for name in target.schemes):
        default = f"`{target.default(scheme)}`" if target.default(scheme) else ""
        key = (default, " ".join(target.forms(scheme)), " ".join(target.lowering(scheme)))
        rows.setdefault(key, []).append(f"`{scheme.name}`")
    head = "| scheme | default | forms | lowering |\n| --- | --- | --- | --- |\n"
    return head + "".join(f"| {', '.join(names)} | {' | '.join(key)} |\n" for key, names in rows.items())


def pages() -> dict[str, str]:
    """File name below docs/ -> text."""
    passes = [describe_pass(name) for name in registry.names()]
    made = {f"passes/{p.name}.md": page(p) for p in passes}
    guide = {RULES_PAGE: rules_page(), OPTIONS_PAGE: commands_page(), TARGETS_PAGE: targets_page()}
    return made | guide | {"passes/README.md": index(passes)}


def present() -> dict[str, str]:
    """The pages that are there now."""
    files = [*(DOCS / "passes").glob("*.md"), *(DOCS / page for page in (RULES_PAGE, OPTIONS_PAGE, TARGETS_PAGE))]
    return {str(f.relative_to(DOCS)): f.read_text(encoding="utf-8") for f in files if f.is_file()}


def main() -> int:
    """Write or check the pages; the number of stale ones decides the exit code of a check."""
    logging.disable()  # shape inference tells of each type that it does not know
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
