"""`qcompile`: the group of all commands, its exit codes, and what a failure looks like."""

from __future__ import annotations

import difflib
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

from qcompile._version import __version__
from qcompile.errors import InputError, QcompileError, UsageError
from qcompile.report import escaped

DEBUG = "QCOMPILE_DEBUG"
INTERRUPTED = 130
GARBAGE = (10_000, 20, 10)  # a graph is millions of small objects: Python's own 700 costs a fifth of a large compile
OWN = ("-h", "--help", "--version")
DEFAULT = "compile"
COMMANDS = {
    "compile": "Quantize MODEL (the default command).",
    "eval": "Compare CANDIDATE with its float REFERENCE on data.",
    "bench": "Time MODELS on ONNX Runtime, or engines on the GPU, interleaved.",
    "check": "Check MODEL against a target's rules.",
    "audit": "Show which kernels MODEL really gets.",
    "build": "Build an engine from MODEL, a Q/DQ model.",
    "refit": "Give ENGINE the weights of an ONNX model.",
    "deploy": "Write MODELs into a Triton model repository.",
    "export-integer": "Write an integer-only MODEL as JSON: weights, multipliers, shifts, zero points, tables.",
    "inspect": "Show what is in MODEL, an ONNX model or an engine.",
    "passes": "List the passes, or show one with its options.",
    "decode": "Write the runs of several steps of decoding as calibration data.",
    "calibrate": "Gather the statistics that compiling MODEL asks for, into a file.",
    "merge": "Merge statistics FILES of disjoint samples.",
}
"""Each command `NAME` is `command` in `qcompile.cli.NAME`, which is imported when it is called: the list needs none of them."""


class Commands(click.Group):
    """Imports a command when it is called, and hands whatever does not start with a command's name to `compile`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, if there is one."""
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"qcompile.cli.{cmd_name.replace('-', '_')}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Name and summary of each."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the default command where none is named."""
        if args and args[0] not in (*COMMANDS, *OWN):
            self._check_near(ctx, args[0])
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Both ways to call it."""
        formatter.write_usage("qcompile", "MODEL [OPTIONS]")
        formatter.write_usage("qcompile", "COMMAND [ARGS]...", prefix="       ")

    def _check_near(self, ctx: click.Context, word: str) -> None:
        """A mistyped command must not be taken for a model."""
        close = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.6)
        if close and not Path(word).suffix and not Path(word).exists():
            raise click.UsageError(f"there is no command and no model {word!r}, did you mean {close[0]!r}?", ctx)


@click.group("qcompile", cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 118})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """Post-training quantization as graph passes: an ONNX model in, a verified Q/DQ model or an engine out.

    Exit codes: 0 done, 1 a check or gate did not hold, 2 usage, 3 the model or data cannot be used, 4 a backend is
    missing or failed.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, never raises."""
    if "numpy" not in sys.modules:  # our products are small: more BLAS threads only wait for each other, at full load
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.set_threshold(*GARBAGE)
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
    except MemoryError as e:
        what = " ".join(str(e).split()) or "no memory is left"
        return _fail(f"out of memory ({what}); give --mem-limit, fewer --samples or a smaller --batch", InputError.exit_code)
    except Exception as e:
        return _internal(e)


def _path(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if isinstance(context, click.Context) else "qcompile"


def _fail(message: str, code: int, prefix: str = "error: ") -> int:
    if os.environ.get(DEBUG) == "1":
        traceback.print_exc()
    sys.stderr.write(escaped(f"{prefix}{message}\n", keep="\n"))
    return code


def _internal(error: Exception) -> int:
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return _fail(f"{what}; this is a bug in qcompile, please report it with the output of {DEBUG}=1", 1, "internal error: ")
