from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import UsageError
from qcompile.pipeline import registry, spec
from qcompile.pipeline.base import Pass, option_name

CLASSES = [cls for name in registry.names() if (cls := registry.lookup(name)) is not None]


def column(error: pytest.ExceptionInfo[UsageError]) -> int:
    """Where the caret stands, in the pipeline string."""
    lines = str(error.value).splitlines()
    assert lines[-1].strip() == "^"
    return lines[-1].index("^") - 2


def fails(text: str) -> pytest.ExceptionInfo[UsageError]:
    with pytest.raises(UsageError) as error:
        registry.parse(text)
    assert error.value.exit_code == 2
    return error


def words(hint: Any) -> st.SearchStrategy[str]:
    """Texts of an option's values, good or not."""
    if isinstance(hint, types.UnionType):
        return st.one_of([words(a) for a in typing.get_args(hint) if a is not type(None)])
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from([str(a) for a in typing.get_args(hint)])
    if hint is bool:
        return st.sampled_from(["true", "false"])
    if hint is int:
        return st.integers(0, 512).map(str)
    if hint is float:
        return st.one_of(st.floats(0, 1), st.floats(1e-12, 1e6)).map(repr)
    return st.text("abcxyz0189*._-:/", min_size=1, max_size=8)


def items() -> st.SearchStrategy[str]:
    """One pass with some of its options, as text."""
    return st.sampled_from(CLASSES).flatmap(_item)


def _item(cls: type[Pass]) -> st.SearchStrategy[str]:
    hints = typing.get_type_hints(cls)
    fields = [f for f in dataclasses.fields(cls) if f.metadata.get("option", True)]
    parts = {option_name(f.name): st.one_of(st.none(), words(hints[f.name])) for f in fields}
    return st.fixed_dictionaries(parts).map(lambda d: _written(cls.name, {k: v for k, v in d.items() if v is not None}))


def _written(name: str, options: dict[str, str]) -> str:
    return name + ("{" + " ".join(f"{k}={v}" for k, v in options.items()) + "}" if options else "")


@settings(max_examples=150, deadline=None)
@given(st.lists(items(), max_size=4))
def test_printing_and_parsing_are_inverse(texts: list[str]) -> None:
    try:
        passes = registry.parse(",".join(texts))
    except UsageError as e:
        assert "^" in str(e), "refused values are pointed at"
        return
    text = spec.format_pipeline(passes)
    assert registry.parse(text) == passes
    assert spec.format_pipeline(registry.parse(text)) == text


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.name)
def test_every_option_has_a_help_text_and_a_default(cls: type[Pass]) -> None:
    hints = typing.get_type_hints(cls, include_extras=True)
    for f in dataclasses.fields(cls):
        assert f.default is not dataclasses.MISSING
        assert any(isinstance(m, str) and m for m in getattr(hints[f.name], "__metadata__", ())), (
            f"{cls.name}: {f.name} has no help"
        )
    assert (cls.__doc__ or "").splitlines()[0].endswith((".", ":"))
    assert "before" in (cls.__doc__ or "") and "after" in (cls.__doc__ or "")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.name)
def test_names_and_keys_can_be_written(cls: type[Pass]) -> None:
    assert registry.parse(cls.name) == [cls()]
    assert spec.format_pass(cls()) == cls.name


def test_blanks_do_not_matter() -> None:
    assert registry.parse("repq , smooth{ alpha=0.25  search }") == registry.parse("repq,smooth{alpha=0.25 search=true}")


def test_nothing_is_the_empty_pipeline() -> None:
    assert registry.parse("") == [] and spec.format_pipeline([]) == ""


def test_only_options_that_differ_are_printed() -> None:
    assert spec.format_pipeline(registry.parse("smooth{alpha=0.5 shift search=false}")) == "smooth{shift}"
    assert spec.format_pipeline(registry.parse("annotate{range=minmax}")) == "annotate{range=minmax}"


@pytest.mark.parametrize(
    ("text", "at", "words"),
    [
        ("repq,smoth", 5, "unknown pass 'smoth', did you mean 'smooth'"),
        ("zzz", 0, "unknown pass 'zzz' (all of them: qcompile passes)"),
        ("repq,smooth{alfa=0.5}", 12, "no option 'alfa', did you mean 'alpha' or 'always'? (it has: alpha,"),
        ("repq,smooth{alpha=much}", 18, "option 'alpha' cannot be 'much'; it takes a number"),
        ("smooth{shift=maybe}", 13, "it takes true or false"),
        ("annotate{range=best}", 15, "it takes auto or minmax or percentile or entropy or mse or weighted or search"),
        ("opset{version=1.5}", 14, "it takes a whole number"),
        ("smooth{alpha}", 7, "needs a value; write alpha=VALUE"),
        ("smooth{alpha=}", 13, "has no value; write alpha=VALUE"),
        ("smooth{alpha=0.1 alpha=0.2}", 17, "given twice"),
        ("repq,smooth{alpha=2}", 5, "alpha=2.0 is outside [0.0, 1.0]"),
        ("smooth{alpha=nan}", 0, "outside"),
        ("smooth{alpha=0.5", 6, "never closed; add a '}'"),
        ("smooth{alpha=0.5,search}", 13, "cannot be '0.5,search'"),
        ("smooth{=3}", 7, "expected an option name, found '='"),
        ("smooth{alpha=0.5 {", 17, "expected an option name"),
        ("repq,", 5, "missing after the last ','"),
        ("repq,,smooth", 5, "a pass name is missing here"),
        (",repq", 0, "a pass name is missing here"),
        ("repq smooth", 5, "expected ',' between passes, found 's'"),
        ("repq}", 4, "expected ','"),
        ("fold-bn{x=1}", 8, "(it has: none)"),
    ],
)
def test_errors_point_at_the_place(text: str, at: int, words: str) -> None:
    error = fails(text)
    assert words in str(error.value) and f"  {text}\n" in str(error.value)
    assert column(error) == at


def test_a_flag_is_a_bare_key() -> None:
    (smooth,) = registry.parse("smooth{search}")
    assert (
        spec.format_pass(smooth) == "smooth{search}" and spec.format_pass(dataclasses.replace(smooth, search=False)) == "smooth"
    )  # type: ignore[call-arg]


@pytest.mark.parametrize("value", [0.1, 1e-9, 1 / 3, 5e-324, math.nextafter(1, 0)])
def test_numbers_survive_exactly(value: float) -> None:
    (smooth,) = registry.parse(f"smooth{{alpha={value!r}}}")
    assert getattr(registry.parse(spec.format_pass(smooth))[0], "alpha") == value  # noqa: B009


def test_presets_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.PRESETS, "vit", "repq,smooth{alpha=0.25}")
    assert spec.format_pipeline(registry.parse("vit,rtn")) == "repq,smooth{alpha=0.25},rtn"


def test_sugar_prints_back_as_what_it_stands_for() -> None:
    text = spec.format_pipeline(registry.parse("repq{softmax=log-sqrt2 percentile=minmax},smooth"))
    assert text == "repq{percentile=minmax},smooth,log2-softmax{kind=log-sqrt2}"
    assert spec.format_pipeline(registry.parse(text)) == text
