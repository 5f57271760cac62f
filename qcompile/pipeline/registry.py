"""Where passes come from: ours by name, other packages' by entry point, the user's by file.py:function."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

from qcompile.errors import UsageError
from qcompile.pipeline import spec
from qcompile.pipeline.base import Pass, Stage
from qcompile.quant.spec import SCHEMES, Scheme
from qcompile.target.catalog import TARGETS
from qcompile.target.target import Target

ENTRY_POINT_GROUP = "qcompile.passes"

PACKAGE = "qcompile.passes"
TREE = Path(__file__).parents[1] / "passes"
FOLDERS = ("forms", "equivalent", "annotate", "fit", "lower")
"""The folders of `passes/`, in the order of the pipeline; a pass is the file of its name there, or a folder with that file."""

PROVIDERS: dict[Stage, str] = {Stage.CANONICAL: "canonicalize", Stage.DECIDED: "annotate", Stage.FITTED: "rtn"}
"""Which pass brings a model to a stage, where the user has not named another."""

UNIFY, IMPORT = "unify-qdq", "import-qdq"
"""What a quantized model goes through besides: in front of the other forms, and of the first pass that decides."""

PRESETS: dict[str, str] = {
    "repq-vit": "repq{softmax=log-sqrt2}",
    "quarot": "rotate{r4=block mean=fold}",
    "quantvggt": "rotate,smooth",
    "mambaquant": "rotate{kind=klt},smooth",
    "dfq": "equalize{by=weights center=false},absorb-bias,bias-correct",
    "fq-vit": "log2-softmax{bits=4}",
    "adalog": "repq,log2-softmax{kind=adalog},compand-gelu,bias-reparam",
    "is-vit": "repq,log2-softmax{kind=sulq}",
    "dopq-vit": "repq,log2-softmax{kind=tan}",
    "ptq4vit": "log2-softmax{kind=twin},compand-gelu{kind=twin}",
}


def names() -> list[str]:
    """All pass names that can be written in a pipeline, sorted."""
    return sorted({*_builtin(), *_entry_points()})


@cache
def _builtin() -> dict[str, str]:
    """Name -> module of our passes, read off the tree without importing them."""
    files = (path for folder in FOLDERS for path in sorted((TREE / folder).iterdir()))
    return {_name(path.stem): f"{PACKAGE}.{path.parent.name}.{module}" for path in files if (module := _module(path))}


def _module(path: Path) -> str | None:
    """A pass's module below its folder; None for what is no pass."""
    if path.suffix == ".py":
        return path.stem if path.stem != "__init__" else None
    return f"{path.name}.{path.name}" if (path / f"{path.name}.py").is_file() else None


def _name(stem: str) -> str:
    return stem.replace("_", "-")


@cache
def _entry_points() -> dict[str, str]:
    return {e.name: e.value for e in entry_points(group=ENTRY_POINT_GROUP)}


def lookup(name: str) -> type[Pass] | None:
    """The class behind a name, imported only now; None if there is no such pass.

    Raises:
        UsageError: an entry point that cannot be imported.
    """
    if ".py:" in name:
        return _load(f"{PACKAGE}.surgery:GraphSurgery")
    if name in _builtin():
        return _of_module(name, importlib.import_module(_builtin()[name]))
    return _load(_entry_points()[name]) if name in _entry_points() else None


def _of_module(name: str, module: ModuleType) -> type[Pass]:
    made_here = (c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__)
    return next(c for c in made_here if issubclass(c, Pass) and c.name == name)


def _load(where: str) -> type[Pass]:
    module, _, attribute = where.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise UsageError(f"pass {where!r} cannot be imported ({e}); reinstall the package that provides it") from e
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise UsageError(f"{where!r} is not a subclass of qcompile.Pass; correct the entry point of the package that provides it")
    return found


def parse(text: str) -> list[Pass]:
    """A pipeline string as passes, presets expanded."""
    return spec.parse(text, lookup, [*names(), *PRESETS], PRESETS.get)


def pass_named(name: str) -> Pass:
    """A pass by name with default options.

    Raises:
        UsageError: there is none.
    """
    cls = lookup(name)
    if cls is None:
        raise UsageError(f"unknown pass {name!r}{spec.near(name, names())} (all of them: qcompile passes)")
    return cls()


def known(given: Iterable[str]) -> Iterator[Pass]:
    """Those of the passes `given` that there are (a file may name some of other versions)."""
    return (pass_named(name) for name in given if name in names())


@cache
def forms() -> tuple[str, ...]:
    """Names of the passes that the planner may insert into the float graph: ours in their order, then other packages'."""
    foreign = (name for name in sorted(_entry_points()) if type(pass_named(name)).is_form())
    return (*importlib.import_module(f"{PACKAGE}.forms").ORDER, *foreign)


def wanted_forms(target: Target, scheme: Scheme) -> list[str]:
    """The forms in which `target` wants the float graph, in order."""
    return [name for name in forms() if type(pass_named(name)).wanted(target, scheme)]


def defaults() -> dict[str, str]:
    """What runs when no --passes is given, by scheme; by `target-scheme` where targets differ."""
    found: dict[str, str] = {}
    for scheme in SCHEMES.values():
        of_target = {t.name: t.default(scheme) for t in TARGETS.values() if scheme.name in t.schemes}
        same = len(set(of_target.values())) == 1
        found |= {scheme.name if same else f"{target}-{scheme.name}": text for target, text in of_target.items() if text}
    return found
