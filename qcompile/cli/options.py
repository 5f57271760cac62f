"""From the options of a verb to those of its command: one click option a field, and help in groups."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from qcompile.errors import UsageError
from qcompile.verbs.options import Option, options_of

MODEL = click.Path(path_type=Path)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, nothing else, on standard output.")


class Text(click.ParamType):
    """A text that the option reads itself."""

    def __init__(self, option: Option) -> None:
        self.name, self._option = option.name, option

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value."""
        try:
            return self._option.check(value)
        except UsageError as e:
            self.fail(str(e), param, ctx)


class GroupedOption(click.Option):
    """An option that says under which heading the help lists it."""

    def __init__(self, *args: Any, group: str, **named: Any) -> None:
        super().__init__(*args, **named)
        self.group = group


class Command(click.Command):
    """Lists options under the headings of their groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section a group, in the order of the options; those without a group come last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                groups.setdefault(param.group if isinstance(param, GroupedOption) else "", []).append(record)
        for title in sorted(groups, key=lambda title: not title):
            with formatter.section(title or "Options"):
                formatter.write_dl(groups[title])


def options(cls: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `cls`; it is called with `given`: those that were given, by name."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def call(**values: Any) -> None:
            source = click.get_current_context().get_parameter_source
            named = {o.name: values.pop(o.name) for o in options_of(cls)}
            given = {name: value for name, value in named.items() if source(name) is not ParameterSource.DEFAULT}
            function(given=given, **values)

        decorated: Callable[..., None] = call
        for option in reversed(options_of(cls)):
            decorated = _click_option(option)(decorated)
        return decorated

    return decorate


def _click_option(o: Option) -> Callable[[Callable[..., None]], Callable[..., None]]:
    names = [n for n in (o.written.short, o.flag, o.name) if n is not None]
    shared: dict[str, Any] = {"cls": GroupedOption, "group": o.group, "help": o.help}
    if o.kind is bool:
        return click.option(*names, is_flag=True, **shared)
    if o.required:
        return click.option(*names, required=True, type=_type(o), metavar=o.written.metavar, **shared)
    shown = o.default not in (None, (), "")
    default = None if o.many else o.default
    named = {"type": _type(o), "metavar": o.written.metavar, "multiple": o.many, "default": default, "show_default": shown}
    return click.option(*names, **named, **shared)


def _type(o: Option) -> click.ParamType | type:
    if o.written.read is not None:
        return Text(o)
    if o.choices:
        return click.Choice(o.choices)
    if o.written.least is not None or o.written.most is not None:
        kind: Any = click.IntRange if o.kind is int else click.FloatRange
        return kind(o.written.least, o.written.most)
    return MODEL if o.kind is Path else o.kind
