"""Pipeline strings: `repq,smooth{alpha=0.5 search}`; the law is parse(format(p)) == p.

pipeline := [item {"," item}]
item     := name ["{" option {" " option} "}"]      name may be file.py:function
option   := key ["=" value]                          a bare key means true
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from qcompile.errors import UsageError, near
from qcompile.pipeline.base import Pass, option_name

_SPECIAL = "{},= "


@dataclass(frozen=True)
class Option:
    """One `key=value` as written, with the column where it starts."""

    key: str
    value: str | None
    column: int


@dataclass(frozen=True)
class Item:
    """One pass as written, with the column where it starts."""

    name: str
    options: tuple[Option, ...]
    column: int


Lookup = Callable[[str], type[Pass] | None]


def caret(text: str, column: int, message: str) -> UsageError:
    """An error that shows the pipeline string and points at the place."""
    return UsageError(f"{message}\n  {text}\n  {' ' * column}^")


def parse_items(text: str) -> list[Item]:
    """Split a pipeline string into items, without knowing any pass.

    Raises:
        UsageError: with a caret under the place.
    """
    items: list[Item] = []
    pos = 0
    while pos < len(text):
        item, pos = _item(text, pos)
        items.append(item)
        if pos < len(text):
            if text[pos] != ",":
                raise caret(text, pos, f"expected ',' between passes, found {text[pos]!r}; separate passes by commas")
            pos += 1
            if pos == len(text):
                raise caret(text, pos, "a pass name is missing after the last ','; add one or remove the comma")
    return items


def _word(text: str, pos: int, stop: str) -> tuple[str, int]:
    end = pos
    while end < len(text) and text[end] not in stop:
        end += 1
    return text[pos:end], end


def _item(text: str, pos: int) -> tuple[Item, int]:
    while pos < len(text) and text[pos] == " ":
        pos += 1
    start = pos
    name, pos = _word(text, pos, "{}, =")
    if not name:
        raise caret(text, start, "a pass name is missing here; see: qcompile passes")
    while pos < len(text) and text[pos] == " ":
        pos += 1
    if pos >= len(text) or text[pos] != "{":
        return Item(name, (), start), pos
    options, pos = _options(text, pos + 1)
    while pos < len(text) and text[pos] == " ":
        pos += 1
    return Item(name, tuple(options), start), pos


def _options(text: str, pos: int) -> tuple[list[Option], int]:
    opened, options = pos - 1, list[Option]()
    while True:
        while pos < len(text) and text[pos] == " ":
            pos += 1
        if pos >= len(text):
            raise caret(text, opened, "this '{' is never closed; add a '}'")
        if text[pos] == "}":
            return options, pos + 1
        option, pos = _option(text, pos)
        options.append(option)


def _option(text: str, pos: int) -> tuple[Option, int]:
    start = pos
    key, pos = _word(text, pos, _SPECIAL)
    if not key:
        raise caret(
            text, start, f"expected an option name, found {text[pos]!r}; options are written key=value, separated by blanks"
        )
    if pos >= len(text) or text[pos] != "=":
        return Option(key, None, start), pos
    value, end = _word(text, pos + 1, " {}")
    if not value:
        raise caret(text, end, f"option {key!r} has no value; write {key}=VALUE")
    return Option(key, value, start), end


def parse(text: str, lookup: Lookup, names: Sequence[str], expand: Callable[[str], str | None] = lambda _: None) -> list[Pass]:
    """Turn a pipeline string into passes.

    `lookup` finds a pass class by name, `names` are suggested for unknown ones, `expand` gives a preset's string.

    Raises:
        UsageError: unknown pass, unknown option or unusable value, with nearest names and a caret.
    """
    passes: list[Pass] = []
    tail: list[Pass] = []
    for item in parse_items(text):
        preset = expand(item.name) if not item.options else None
        if preset is not None:
            passes += parse(preset, lookup, names)
            continue
        cls = lookup(item.name)
        if cls is None:
            raise caret(text, item.column, f"unknown pass {item.name!r}{near(item.name, names)} (all of them: qcompile passes)")
        made, suffix = build(text, item, cls)
        passes.append(made)
        tail += parse(suffix, lookup, names)
    return passes + tail


def build(text: str, item: Item, cls: type[Pass]) -> tuple[Pass, str]:
    """An instance of `cls` with the options of `item`, and the passes that a sugar option puts at the pipeline's end."""
    fields = {option_name(f.name): f for f in dataclasses.fields(cls) if f.metadata.get("option", True)}
    hints = typing.get_type_hints(cls)
    given: dict[str, Any] = {}
    for option in item.options:
        if option.key not in fields:
            known = ", ".join(fields) or "none"
            raise caret(
                text,
                option.column,
                f"pass {item.name!r} has no option {option.key!r}{near(option.key, fields)} (it has: {known})",
            )
        field = fields[option.key]
        if field.name in given:
            raise caret(text, option.column, f"option {option.key!r} is given twice; remove one")
        given[field.name] = _value(text, option, hints[field.name])
    try:
        instance = cls.from_item(item.name, given) if hasattr(cls, "from_item") else cls(**given)  # type: ignore[attr-defined]
    except UsageError as e:
        raise caret(text, item.column, str(e)) from e
    return instance.sugar()


def with_option(p: Pass, key: str, value: Any) -> Pass | None:
    """The pass with an option; None if it has none of that name.

    Raises:
        UsageError: it was given another value.
    """
    field = next((f for f in dataclasses.fields(p) if option_name(f.name) == key), None)
    if field is None:
        return None
    held = getattr(p, field.name)
    if held not in (field.default, value):
        raise UsageError(f"--{key} {value} and {p.name}{{{key}={held}}} differ; give one of them")
    return dataclasses.replace(p, **{field.name: value})


def _value(text: str, option: Option, hint: Any) -> Any:
    if option.value is None:
        if hint is bool:
            return True
        raise caret(text, option.column, f"option {option.key!r} needs a value; write {option.key}=VALUE")
    for kind in _alternatives(hint):
        converted = _convert(option.value, kind)
        if converted is not None:
            return converted
    column = option.column + len(option.key) + 1
    raise caret(text, column, f"option {option.key!r} cannot be {option.value!r}; it takes {describe(hint)}")


def _alternatives(hint: Any) -> list[Any]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [a for a in typing.get_args(hint) if a is not type(None)]
    return [hint]


def _convert(value: str, kind: Any) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        return value if value in typing.get_args(kind) else None
    if kind is bool:
        return {"true": True, "false": False}.get(value.lower())
    if kind is str:
        return value
    try:
        return kind(value)
    except ValueError:
        return None


def describe(hint: Any) -> str:
    """What an option of this type takes, in words."""
    words: list[str] = []
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is typing.Literal:
            words += [str(a) for a in typing.get_args(kind)]
        else:
            words.append({bool: "true or false", int: "a whole number", float: "a number", str: "a word"}.get(kind, str(kind)))
    return " or ".join(words)


def format_pass(p: Pass) -> str:
    """The canonical string of one pass: only the options that differ from their defaults."""
    parts: list[str] = []
    for f in dataclasses.fields(p):
        value = getattr(p, f.name)
        if value == f.default or not f.metadata.get("option", True):
            continue
        parts.append(option_name(f.name) if value is True else f"{option_name(f.name)}={_text(value)}")
    name = p.spec_name() if hasattr(p, "spec_name") else p.name  # type: ignore[attr-defined]
    return name + (f"{{{' '.join(parts)}}}" if parts else "")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, float) else str(value)


def format_pipeline(passes: Iterable[Pass]) -> str:
    """The canonical string of a pipeline."""
    return ",".join(format_pass(p) for p in passes)
