"""`qcompile build`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qcompile.cli.audit import audit_lines, profile_text
from qcompile.cli.options import MODEL, Command, as_json, options
from qcompile.cli.output import answer, megabytes, print_text
from qcompile.cli.progress import reporter
from qcompile.verbs.build import EngineBuildOptions, EngineResult, build
from qcompile.verbs.options import made


@click.command("build", cls=Command)
@click.argument("model", type=MODEL)
@options(EngineBuildOptions)
@as_json
def command(model: Path, given: Mapping[str, Any], as_json: bool) -> None:
    """Build an engine from MODEL, a Q/DQ model.

    Target rtx needs no GPU, and the engine is audited.
    """
    with reporter() as progress:
        built = build(model, made(EngineBuildOptions, given), progress)
    answer(built, as_json, show_engine)


def show_engine(made: EngineResult) -> None:
    """The engine's file, its profile and the audits."""
    b = made.build
    print_text("", f"engine       {b.path} ({megabytes(b.size)}, built in {b.seconds:.1f} s with {b.backend} {b.version})")
    print_text(f"manifest     {b.manifest_path}")
    print_text(*(f"profile      {profile_text(profile)}" for profile in b.profiles))
    for audit in made.audits:
        print_text(*audit_lines(audit))
