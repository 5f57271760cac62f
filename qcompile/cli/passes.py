"""`qcompile passes`."""

from __future__ import annotations

import click

from qcompile.cli.options import as_json
from qcompile.cli.output import answer, print_table, print_text
from qcompile.verbs.passes import Listing, OnePass, OptionHelp, list_passes, show_one


@click.command("passes")
@click.argument("name", required=False)
@as_json
def command(name: str | None, as_json: bool) -> None:
    """List the passes, or show one with its options."""
    if name is None:
        answer(list_passes(), as_json, show_passes)
    else:
        answer(show_one(name), as_json, show_pass)


def show_passes(listing: Listing) -> None:
    """All passes, presets and the default pipelines."""
    print_table(["pass", "kind", "what"], [(p.name, p.kind, p.help) for p in listing.passes])
    for title, pipelines in (
        ("presets (write them like passes)", listing.presets),
        ("what runs without --passes", listing.defaults),
    ):
        if pipelines:
            print_text("", title)
            print_table(["name", "pipeline"], sorted(pipelines.items()))
    print_text("", "one pass with its options: qcompile passes NAME")


def show_pass(shown: OnePass) -> None:
    """One pass in full."""
    p = shown.described
    print_text(f"{p.name} ({p.kind})", "", *p.text.splitlines())
    print_text("", f"needs        a {p.needs} model" + (f", behind {', '.join(p.after)}" if p.after else ""))
    if p.reaches is not None:
        print_text(f"makes it     {p.reaches}")
    if p.options:
        print_text("")
        print_table(["option", "takes", "default", "what"], [_option_row(o) for o in p.options])


def _option_row(o: OptionHelp) -> tuple[str, str, str, str]:
    return o.name, o.takes, "-" if o.default is None else o.default, o.help
