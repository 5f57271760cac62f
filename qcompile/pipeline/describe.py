"""Passes described from their own source: name, kind, help, docstring and options."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from dataclasses import dataclass
from typing import Any

from qcompile.errors import UsageError
from qcompile.pipeline import registry
from qcompile.pipeline.base import Pass, option_name
from qcompile.pipeline.spec import describe, near


@dataclass(frozen=True)
class OptionHelp:
    """One option as written in pipeline strings: what it takes, its default (None: it must be given), its help."""

    name: str
    takes: str
    default: str | None
    help: str


@dataclass(frozen=True)
class PassHelp:
    """One pass: its first docstring line is `help`, the whole docstring `text`; stages by their names."""

    name: str
    kind: str
    help: str
    text: str
    options: tuple[OptionHelp, ...]
    needs: str
    reaches: str | None
    after: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dict; options as dicts."""
        return dataclasses.asdict(self)


def describe_passes() -> list[PassHelp]:
    """Every pass that can be named, sorted by name."""
    return [describe_pass(name) for name in registry.names()]


def describe_pass(name: str) -> PassHelp:
    """One pass by name (or `file.py:function`).

    Raises:
        UsageError: there is no such pass; near names are suggested.
    """
    cls = registry.lookup(name)
    if cls is None:
        if name in registry.PRESETS:
            raise UsageError(f"{name!r} is a preset, for --passes {name}: {registry.PRESETS[name]}; name one of its passes")
        raise UsageError(f"unknown pass {name!r}{near(name, registry.names())} (all of them: qcompile passes)")
    text = inspect.cleandoc(cls.__doc__ or "")
    stages = (cls.needs.name.lower(), cls.reaches.name.lower() if cls.reaches else None, cls.after)
    return PassHelp(cls.name or name, cls.kind.value, text.partition("\n")[0], text, _options(cls), *stages)


def first_line(p: Pass | type[Pass]) -> str:
    """A pass's help."""
    return (p.__doc__ or "").strip().splitlines()[0]


def _options(cls: type[Pass]) -> tuple[OptionHelp, ...]:
    hints = typing.get_type_hints(cls, include_extras=True)
    shown = (f for f in dataclasses.fields(cls) if f.metadata.get("option", True))
    return tuple(_option(f, hints[f.name]) for f in shown)


def _option(field: dataclasses.Field[Any], hint: Any) -> OptionHelp:
    annotated = typing.get_origin(hint) is typing.Annotated
    base = typing.get_args(hint)[0] if annotated else hint
    text = next((str(m) for m in getattr(hint, "__metadata__", ()) if isinstance(m, str)), "")
    return OptionHelp(option_name(field.name), describe(base), _default(field.default), text)


def _default(value: Any) -> str | None:
    if value is dataclasses.MISSING:
        return None
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
