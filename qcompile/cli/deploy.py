"""`qcompile deploy`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qcompile.cli.options import MODEL, Command, as_json, options
from qcompile.cli.output import answer, number, print_table, print_text
from qcompile.verbs.deploy.deploy import Deployed, Deployments, deploy_all
from qcompile.verbs.deploy.options import DeployOptions
from qcompile.verbs.deploy.parity import PROVIDER, Distance, Parity
from qcompile.verbs.options import made


@click.command("deploy", cls=Command)
@click.argument("models", type=MODEL, nargs=-1, required=True, metavar="MODEL...")
@options(DeployOptions)
@as_json
def command(models: tuple[Path, ...], given: Mapping[str, Any], as_json: bool) -> None:
    """Write MODELs into a Triton model repository.

    An ONNX model is first run as the server will run it; nothing appears in DIR before all checks have passed.
    """
    answer(deploy_all(models, made(DeployOptions, given)), as_json, show_deployments)


def show_deployments(found: Deployments) -> None:
    """Each model."""
    for model in found.models:
        show_deployed(model)


def show_deployed(d: Deployed) -> None:
    """The files, the interface, and what was checked."""
    print_text(f"{d.folder}: version {d.version}, backend {d.backend}", "", *(f"  {name}" for name in d.files), "")
    rows = [(side, io["name"], io["data_type"], str(io["dims"])) for side in ("input", "output") for io in d.config[side]]
    print_table(["", "name", "type", "dims"], rows)
    batching = f"up to {d.max_batch_size}, joined by the server" if d.max_batch_size else "none"
    print_text("", f"batching     {batching}", f"warm-up      {f'a request from {d.data}' if d.warmup else 'none'}")
    print_text(f"file         sha256 {d.integrity.sha256[:16]}, same as {d.integrity.same_as}")
    if d.parity is not None:
        _show_parity(d.parity)
    print_text(*(f"note         {note}" for note in d.notes))


def _show_parity(parity: Parity) -> None:
    print_text(f"parity       {parity.samples} requests on {PROVIDER}, against {parity.reference}")
    print_text(*(f"             {name}: {_distance(d)}" for name, d in parity.outputs.items()))


def _distance(d: Distance) -> str:
    if not d.largest_error:
        return "equal"
    error = f"largest error {d.largest_error:.3g} ({d.relative_error:.1e} relative)"
    return f"SQNR {number(d.sqnr_db, unit=' dB')}, {error}"
