"""`qcompile deploy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from qcompile.cli.options import MODEL, as_json
from qcompile.cli.output import number, print_json, print_table, print_text
from qcompile.errors import UsageError
from qcompile.report import SCHEMA_VERSION
from qcompile.verbs.deploy.deploy import DEFAULT_SAMPLES, DeployOptions, deploy


@click.command("deploy")
@click.argument("models", type=MODEL, nargs=-1, required=True, metavar="MODEL...")
@click.option("--triton", "repository", type=MODEL, required=True, metavar="DIR", help="The model repository; made if missing.")
@click.option("--name", help="Of the model in the repository; default: the file's name up to its first dot.")
@click.option("--backend", type=click.Choice(["tensorrt", "onnxruntime"]), help="Default: tensorrt for engines.")
@click.option("--max-batch", type=click.IntRange(0), metavar="N", help="0: no batching. Default: the engine's profile, else 8.")
@click.option("--preferred-batch", metavar="N,N", help="Batch sizes that the dynamic batcher waits for.")
@click.option("--queue-delay-us", type=click.IntRange(0), metavar="N", help="How long a request may wait for others.")
@click.option("--instances", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Copies on each GPU.")
@click.option("--version", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="The version folder.")
@click.option("--policy", default="latest", show_default=True, metavar="P", help="Versions to serve: latest, all, or N,N.")
@click.option("--accelerator", type=click.Choice(["tensorrt"]), help="For ONNX models: run on TensorRT inside ONNX Runtime.")
@click.option("--labels", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Class names, one a line.")
@click.option("--data", metavar="DATA", help="Real requests: warm-up and parity check. Default: the data beside the model.")
@click.option("--preprocess", metavar="SPEC", help="For pictures: a preset or a TOML file.")
@click.option("--samples", type=click.IntRange(1), help=f"Default: at most {DEFAULT_SAMPLES}.")
@click.option("--reference", type=MODEL, metavar="REF.onnx", help="The float model to compare outputs with.")
@click.option("--min-sqnr", type=float, metavar="DB", help="Deploy nothing (exit 1) if the SQNR is lower.")
@click.option("--onnx", type=MODEL, metavar="FILE", help="What the engine was built from; default: as its manifest says.")
@click.option("--replace", is_flag=True, help="Overwrite this version, and the config.")
@as_json
def command(
    models: tuple[Path, ...], repository: Path, as_json: bool, preferred_batch: str | None, policy: str, **options: Any
) -> None:
    """Write MODELs into a Triton model repository.

    An ONNX model is first run as the server will run it; nothing appears in DIR before all checks have passed.
    """
    if len(models) > 1 and options["name"]:
        raise UsageError("--name names one model; drop it, or deploy the models one by one")
    chosen = DeployOptions(**options, preferred=_numbers(preferred_batch, "--preferred-batch"), policy=_policy(policy))
    documents = [deploy(m, repository, chosen) for m in models]
    if as_json:
        print_json(documents[0] if len(documents) == 1 else {"schema_version": SCHEMA_VERSION, "models": documents})
        return
    for document in documents:
        show_deployment(document)


def _policy(text: str) -> Literal["latest", "all"] | tuple[int, ...]:
    return text if text in ("latest", "all") else _numbers(text, "--policy")


def _numbers(text: str | None, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in (text or "").split(",") if n.strip())
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of numbers; write e.g. {option} 4,8") from None


def show_deployment(document: dict[str, Any]) -> None:
    """The files, the interface, and what was checked."""
    print_text(f"{document['folder']}: version {document['version']}, backend {document['backend']}", "")
    print_text(*(f"  {name}" for name in document["files"]), "")
    config = document["config"]
    rows = [(side, io["name"], io["data_type"], str(io["dims"])) for side in ("input", "output") for io in config[side]]
    print_table(["", "name", "type", "dims"], rows)
    batching = f"up to {document['max_batch_size']}, joined by the server" if document["max_batch_size"] else "none"
    print_text("", f"batching     {batching}", f"warm-up      {_warmup(document)}", f"file         {_integrity(document)}")
    if document["parity"]:
        _show_parity(document["parity"])
    print_text(*(f"note         {note}" for note in document["notes"]))


def _warmup(document: dict[str, Any]) -> str:
    return f"a request from {document['data']}" if document["warmup"] else "none"


def _integrity(document: dict[str, Any]) -> str:
    return f"sha256 {document['integrity']['sha256'][:16]}, same as {document['integrity']['same_as']}"


def _show_parity(parity: dict[str, Any]) -> None:
    print_text(f"parity       {parity['samples']} requests on {parity['provider']}, against {parity['reference']}")
    print_text(*(f"             {out['name']}: {_distance(out)}" for out in parity["outputs"]))


def _distance(out: dict[str, Any]) -> str:
    if not out["max_error"]:
        return "equal"
    error = f"largest error {out['max_error']:.3g} ({out['relative_error']:.1e} relative)"
    return f"SQNR {number(out['sqnr_db'], unit=' dB')}, {error}"
