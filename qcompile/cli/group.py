"""A command group with a default command: `qcompile model.onnx` is `qcompile compile model.onnx`."""

from __future__ import annotations

import difflib
from pathlib import Path

import click

OWN = ("-h", "--help", "--version")


class DefaultGroup(click.Group):
    """Hands whatever does not start with a command's name to `compile`."""

    default = "compile"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the default command where none is named."""
        if args and args[0] not in (*self.commands, *OWN):
            self._check_near(ctx, args[0])
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Both ways to call it."""
        formatter.write_usage("qcompile", "MODEL [OPTIONS]")
        formatter.write_usage("qcompile", "COMMAND [ARGS]...", prefix="       ")

    def _check_near(self, ctx: click.Context, word: str) -> None:
        """A mistyped command must not be taken for a model."""
        close = difflib.get_close_matches(word, self.commands, n=1, cutoff=0.6)
        if close and not Path(word).suffix and not Path(word).exists():
            raise click.UsageError(f"there is no command and no model {word!r}, did you mean {close[0]!r}?", ctx)
