"""`qcompile check`."""

from __future__ import annotations

from pathlib import Path

import click

from qcompile.cli.check_view import show_findings, show_proof
from qcompile.cli.options import MODEL, as_json
from qcompile.cli.output import print_json
from qcompile.errors import UsageError
from qcompile.target.rules import RULES
from qcompile.verbs.build import gpu_list, recorded_target
from qcompile.verbs.check import Checked, check_file, fix_file, write_sarif

STDOUT = "-"


@click.command("check")
@click.argument("model", type=MODEL)
@click.option("--target", type=click.Choice(list(RULES)), help="Default: what the model was compiled for, else trt.")
@click.option("--gpu", metavar="SM,..", help="Also check what these GPUs can compute, e.g. sm86,sm89.")
@click.option("--fix", is_flag=True, help="Apply the mechanical fixes to a copy (-o) and check it again.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The repaired model of --fix.")
@click.option("--sarif", metavar="FILE|-", help="Write the findings as SARIF 2.1.0 (- is standard output).")
@click.option("--proof", is_flag=True, help="Of an integer-only model: the bound and the margin of every node.")
@as_json
def check_command(
    model: Path,
    target: str | None,
    gpu: str | None,
    fix: bool,
    output: Path | None,
    sarif: str | None,
    proof: bool,
    as_json: bool,
) -> None:
    """Check MODEL against a target's rules.

    Exit code 1 on errors (with --fix: on errors that remain): what the backend refuses, or silently runs in float.
    """
    _check_options(fix, output, sarif, as_json)
    chosen, gpus = target or recorded_target(model, RULES), gpu_list(gpu) if gpu else ()
    checked = fix_file(model, output, chosen, gpus) if output is not None else check_file(model, chosen, gpus)
    _print(checked, model if output is None else output, sarif, proof, as_json)
    if any(f.severity == "error" for f in checked.findings):
        click.get_current_context().exit(1)


def _check_options(fix: bool, output: Path | None, sarif: str | None, as_json: bool) -> None:
    if fix != (output is not None):
        missing, have = ("-o FIXED.onnx", "--fix") if fix else ("--fix", "-o")
        raise UsageError(f"{have} needs {missing}: the repaired model is a new file")
    if sarif == STDOUT and as_json:
        raise UsageError("--json and --sarif - both want standard output; give --sarif a file")


def _print(checked: Checked, model: Path, sarif: str | None, proof: bool, as_json: bool) -> None:
    if sarif is not None and sarif != STDOUT:
        write_sarif(checked, model, Path(sarif))
    if sarif == STDOUT:
        print_json(checked.to_sarif(model.name))
    elif as_json:
        print_json(checked.to_json())
    else:
        show_findings(checked)
        show_proof(checked, every_node=proof)
