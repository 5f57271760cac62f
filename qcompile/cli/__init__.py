"""The command line: click commands that call the library and show what it answers.  No logic here."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

from qcompile import __version__
from qcompile.cli.commands import COMMANDS
from qcompile.cli.compile_command import compile_command
from qcompile.cli.group import DefaultGroup
from qcompile.errors import QcompileError, UsageError

DEBUG = "QCOMPILE_DEBUG"
INTERRUPTED = 130


@click.group("qcompile", cls=DefaultGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 118})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Post-training quantization as graph passes: an ONNX model in, a verified Q/DQ model or an engine out.

    Exit codes: 0 done, 1 a check or gate did not hold, 2 usage, 3 the model or data cannot be used, 4 a backend is
    missing or failed.
    """


for command in (compile_command, *COMMANDS):
    cli.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, never raises."""
    try:
        code = cli.main(args=list(argv) if argv is not None else None, prog_name="qcompile", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as e:
        return _fail(e.format_message(), UsageError.exit_code, "")
    except click.ClickException as e:
        return _fail(f"{e.format_message()} (see: {_path(e)} --help)", UsageError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted; no output was written after this point", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except QcompileError as e:
        return _fail(str(e), e.exit_code)
    except Exception as e:
        return _internal(e)


def _path(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if isinstance(context, click.Context) else "qcompile"


def _fail(message: str, code: int, prefix: str = "error: ") -> int:
    if os.environ.get(DEBUG) == "1":
        traceback.print_exc()
    sys.stderr.write(f"{prefix}{message}\n")
    return code


def _internal(error: Exception) -> int:
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return _fail(f"{what}; this is a bug in qcompile, please report it with the output of {DEBUG}=1", 1, "internal error: ")
