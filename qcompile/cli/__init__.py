"""The command line: click commands that call the verbs and show what they answer.  No logic here."""

from __future__ import annotations

from qcompile.cli.app import main

__all__ = ["main"]
