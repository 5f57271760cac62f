"""What starting costs: the list of commands and `import qcompile` load none of the libraries behind the commands."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import click
import pytest

import qcompile
from qcompile.cli.app import COMMANDS

WRITERS = """
    Pass SitePass FoldPass Fold Applied Missed Kind Stage Changes AffineMap PassContext PassResult Needs Rounds Told Probe
    Observer MinMax AbsMax Histogram Moments SecondMoment Rows Foldable Matches Refusal Target Placement
    find_norms find_linears find_norm_to_linears find_attentions find_mlps find_conv_chains
    set_constant add_constant new_node insert_after replace_value erase
"""
HEAVY = ("numpy", "onnx", "onnxruntime", "onnx_ir", "onnxscript", "scipy", "sympy", "rich", "polygraphy")


@pytest.mark.parametrize("code", ["import qcompile", "from qcompile.cli import main; main(['--help'])"], ids=["import", "help"])
def test_nothing_heavy_is_loaded(code: str) -> None:
    program = f"import sys; {code}; print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_an_interrupt_while_modules_are_imported_is_one_line() -> None:
    program = """
import sys
class Stops:
    def find_spec(self, name, *rest):
        if name == "qcompile.cli.app":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stops())
from qcompile.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "error: interrupted; nothing was written\n")


def test_importing_changes_no_environment() -> None:
    program = "import os; before = dict(os.environ); import qcompile; assert dict(os.environ) == before"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_what_the_command_says_itself(name: str) -> None:
    command = importlib.import_module(f"qcompile.cli.{name.replace('-', '_')}").command
    assert isinstance(command, click.Command) and command.name == name
    assert (command.help or "").partition("\n\n")[0].replace("\n", " ") == COMMANDS[name]


def test_every_exported_name_is_there() -> None:
    assert all(getattr(qcompile, name) is not None for name in dir(qcompile))
    assert {*WRITERS.split()} <= {*dir(qcompile)}
    with pytest.raises(AttributeError, match="no attribute 'compil'"):
        qcompile.compil  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_type_checkers_see_the_names_that_are_exported() -> None:
    tree = ast.parse(Path(str(qcompile.__file__)).read_text(encoding="utf-8"))
    (guarded,) = (n for n in tree.body if isinstance(n, ast.If))
    seen = {(a.name, a.asname, n.module) for n in guarded.body if isinstance(n, ast.ImportFrom) for a in n.names}
    homes = {name: f"qcompile.{module}" for module, names in qcompile._FROM.items() for name in names}  # pyright: ignore[reportPrivateUsage]
    assert seen == {(name, name, home) for name, home in homes.items()}
