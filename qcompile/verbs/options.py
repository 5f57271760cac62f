"""Options of the verbs: a frozen dataclass a verb, whose fields say everything about them once, as those of passes do.

    samples: Annotated[int | None, "Spread evenly over DATA.", Written(least=1)] = None

The type is what is taken (bool, int, float, str, Path, a Literal of words, a tuple of strings for what may be repeated, each
with `| None`), the text is the help, `Written` the rest.  From this come the command line, `made` (the Python API and the
sidecar file beside a model), `words` (the command that says the same again), `to_json` and the tables of the guide.
Options that verbs share are dataclasses that theirs inherit; the first line of its docstring is the group's title.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
import tomllib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from qcompile.errors import UsageError, near

T = TypeVar("T")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


@dataclass(frozen=True)
class Written:
    """How an option is written and read, beside its type, default and help.

    `flag`, `short`: on the command line, where the field's name with dashes will not do.  `choices`: all that it may be.
    `least`, `most`: bounds of a number.  `read`: a value from its text; raises UsageError.  `beside`: what a text in a sidecar
    file means, given the file's folder.  `once`: it belongs to one command and cannot stand in a sidecar file.
    """

    metavar: str | None = None
    flag: str | None = None
    short: str | None = None
    choices: Collection[str] = ()
    least: float | None = None
    most: float | None = None
    read: Callable[[str], Any] | None = None
    beside: Callable[[Path, str], str] | None = None
    once: bool = False


@dataclass(frozen=True)
class Option:
    """One option, from its field; `kind` is the type of one value."""

    name: str
    kind: type
    default: Any
    help: str
    many: bool
    group: str
    written: Written

    @property
    def flag(self) -> str:
        """--keep-float"""
        return self.written.flag or f"--{self.name.replace('_', '-')}"

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is dataclasses.MISSING

    @property
    def choices(self) -> tuple[str, ...]:
        """All that it may be now; empty where that is no list."""
        return tuple(self.written.choices)

    def check(self, value: Any) -> Any:
        """`value` as the field holds it: numbers in range, texts read, paths as `Path`.

        Raises:
            UsageError: it cannot be that.
        """
        if value is None and self.default is None:
            return None
        if self.many:
            return tuple(self._one(v) for v in ((value,) if isinstance(value, str) else self._each(value)))
        return self._one(value)

    def _each(self, value: Any) -> Iterable[Any]:
        if not isinstance(value, (list, tuple)):
            raise UsageError(f"{self.name} cannot be {value!r}; it takes strings")
        return typing.cast(Iterable[Any], value)

    def _one(self, value: Any) -> Any:
        if self.written.read is not None:
            return self.written.read(value) if isinstance(value, str) else value
        if self.kind is Path and isinstance(value, (str, Path)):
            return Path(value)
        if not (type(value) is self.kind or (self.kind is float and type(value) is int)):
            raise UsageError(f"{self.name} cannot be {value!r}; it takes {_WORDS.get(self.kind, 'a string')}")
        self._require_inside(value)
        return value

    def _require_inside(self, value: Any) -> None:
        least, most = self.written.least, self.written.most
        if self.choices and value not in self.choices:
            raise UsageError(f"unknown {self.name} {value!r}{near(value, self.choices)} (it may be: {', '.join(self.choices)})")
        if least is not None and value < least:
            raise UsageError(f"{self.name} is {value}; give at least {least:g}")
        if most is not None and value > most:
            raise UsageError(f"{self.name} is {value}; give at most {most:g}")

    def words(self, value: Any) -> list[str]:
        """The option as written on a command line; nothing where it has its default."""
        if value == self.default or value is None:
            return []
        if self.kind is bool:
            return [self.flag]
        return [w for v in (value if self.many else (value,)) for w in (self.flag, str(v))]


_WORDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number"}


@cache
def options_of(cls: type) -> tuple[Option, ...]:
    """The options of a dataclass, in the order of its fields."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return tuple(_option(cls, f, hints[f.name]) for f in dataclasses.fields(cls))


def _option(cls: type, field: dataclasses.Field[Any], hint: Any) -> Option:
    base, *about = typing.get_args(hint)
    union = typing.get_origin(base) in (types.UnionType, typing.Union)
    kinds = [k for k in (typing.get_args(base) if union else (base,)) if k is not types.NoneType]
    kind, many = (str, True) if typing.get_origin(kinds[-1]) is tuple else (kinds[-1], False)
    written = next((a for a in about if isinstance(a, Written)), Written())
    if typing.get_origin(kind) is typing.Literal:
        kind, written = str, dataclasses.replace(written, choices=typing.get_args(kind))
    many = many and written.read is None
    return Option(field.name, kind, field.default, about[0], many, _group(cls, field.name), written)


def _group(cls: type, name: str) -> str:
    home = [c for c in cls.__mro__ if name in inspect.get_annotations(c)][-1]
    return (home.__doc__ or "").partition("\n")[0].rstrip(".")


def made(cls: type[T], given: Mapping[str, Any], model: Path | None = None, keys: type | None = None) -> T:
    """Options from what was given by name; the sidecar file of `model`, if it has one, says what was not given.

    The file may hold all options of `keys` (default: `cls`); those that `cls` does not have are left to other verbs.

    Raises:
        UsageError: an unknown or a missing name; a value that the option cannot be; an unusable sidecar file.
    """
    known = {o.name: o for o in options_of(cls)}
    for name in given:
        if name not in known:
            raise UsageError(f"unknown option {name!r}{near(name, known)} (options: {', '.join(known)})")
    missing = [o.name for o in known.values() if o.required and o.name not in given]
    if missing:
        raise UsageError(f"the option {missing[0]!r} must be given")
    found = {} if model is None else {n: v for n, v in _sidecar(model, keys or cls, given).items() if n in known}
    return cls(**{name: known[name].check(value) for name, value in {**found, **given}.items()})


def checked(options: T) -> T:
    """The same options, each value checked (see `Option.check`)."""
    return type(options)(**{o.name: o.check(getattr(options, o.name)) for o in options_of(type(options))})


def part(options: Any, cls: type[T]) -> T:
    """The options of `cls`, which the class of `options` inherits."""
    return cls(**{o.name: getattr(options, o.name) for o in options_of(cls)})


def changed(options: Any) -> dict[str, Any]:
    """The options that differ from their defaults, by name."""
    every = {o.name: (getattr(options, o.name), o.default) for o in options_of(type(options))}
    return {name: value for name, (value, default) in every.items() if value != default}


def words(options: Any, names: Iterable[str]) -> list[str]:
    """Those named, as written on a command line, without those that have their defaults."""
    return [w for o in options_of(type(options)) if o.name in set(names) for w in o.words(getattr(options, o.name))]


def to_json(options: Any) -> dict[str, Any]:
    """Every option by name; paths as strings."""
    values = {o.name: getattr(options, o.name) for o in options_of(type(options))}
    return {n: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for n, v in values.items()}


def _sidecar(model: Path, keys: type, typed: Collection[str]) -> dict[str, Any]:
    """What `MODEL.qcompile.toml` holds: keys as on the command line or as fields, texts that are paths from there.

    A model's folder is data: what names code is refused unless that option is among those `typed`.
    """
    file = model.with_name(f"{model.stem}.qcompile.toml")
    if not file.is_file():
        return {}
    try:
        given = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"{file} is not valid TOML ({e}); correct it") from e
    known = {o.flag.removeprefix("--"): o for o in options_of(keys) if not o.written.once}
    values = dict[str, Any]()
    for key, value in given.items():
        option = known.get(key.replace("_", "-"))
        if option is None:
            raise UsageError(f"{file} has an unknown key {key!r}{near(key, known)} (it may hold: {', '.join(sorted(known))})")
        if option.name not in typed:
            _require_no_code(file, option, value)
        values[option.name] = _placed(file, option, value)
    return values


def _require_no_code(file: Path, option: Option, value: Any) -> None:
    if isinstance(value, str) and re.search(r"\.py:", value):
        what = f"{file} names Python code ({option.name} = {value!r}), which runs only where it is typed"
        raise UsageError(f"{what}; if you trust it, add {shlex.join([option.flag, value])}")


def _placed(file: Path, option: Option, value: Any) -> Any:
    try:
        value = option.check(value)
    except UsageError as e:
        raise UsageError(f"{file}: {e}") from e
    if option.kind is Path:
        return file.parent / value
    return option.written.beside(file.parent, str(value)) if option.written.beside is not None else value


def size(text: str) -> int:
    """Bytes of `4GiB`, `500MB`, `2000000`.

    Raises:
        UsageError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{text!r} is no size; write for example 4GiB or 500MB")
    return int(float(match[1]) * _UNITS[str(match[2] or "")])
