"""`qcompile passes`."""

from __future__ import annotations

from typing import Any

import click

from qcompile.cli.options import as_json
from qcompile.cli.output import print_json, print_table, print_text
from qcompile.pipeline import registry
from qcompile.pipeline.describe import OptionHelp, PassHelp, describe_pass, describe_passes
from qcompile.report import SCHEMA_VERSION


@click.command("passes")
@click.argument("name", required=False)
@as_json
def command(name: str | None, as_json: bool) -> None:
    """List the passes, or show one with its options."""
    if name is None:
        document = _passes_document()
        print_json(document) if as_json else show_passes(document)
        return
    described = describe_pass(name)
    print_json({"schema_version": SCHEMA_VERSION, **described.to_json()}) if as_json else show_pass(described)


def _passes_document() -> dict[str, Any]:
    passes = [p.to_json() for p in describe_passes()]
    presets = {"presets": dict(registry.PRESETS), "defaults": registry.defaults()}
    return {"schema_version": SCHEMA_VERSION, "passes": passes, **presets}


def show_passes(document: dict[str, Any]) -> None:
    """All passes, presets and the default pipelines."""
    print_table(["pass", "kind", "what"], [(p["name"], p["kind"], p["help"]) for p in document["passes"]])
    for title in ("presets", "defaults"):
        if document[title]:
            print_text("", {"presets": "presets (write them like passes)", "defaults": "what runs without --passes"}[title])
            print_table(["name", "pipeline"], sorted(document[title].items()))
    print_text("", "one pass with its options: qcompile passes NAME")


def show_pass(p: PassHelp) -> None:
    """One pass in full."""
    print_text(f"{p.name} ({p.kind})", "", p.text)
    print_text("", f"needs        a {p.needs} model" + (f", behind {', '.join(p.after)}" if p.after else ""))
    if p.reaches is not None:
        print_text(f"makes it     {p.reaches}")
    if p.options:
        print_text("")
        print_table(["option", "takes", "default", "what"], [_option_row(o) for o in p.options])


def _option_row(o: OptionHelp) -> tuple[str, str, str, str]:
    return o.name, o.takes, "-" if o.default is None else o.default, o.help
