"""Protobuf text format, written from plain values: what Triton's config.pbtxt needs of it and no more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

INDENT = "  "


class Name(str):
    """An enum value: written without quotes."""

    __slots__ = ()


def to_text(message: Mapping[str, object]) -> str:
    """`message` in text format: {field: value}, a list repeats the field, a dict is a message, `Name` an enum value."""
    return "".join(f"{line}\n" for line in _fields(message))


def _fields(message: Mapping[str, object]) -> Iterator[str]:
    for name, value in message.items():
        repeated = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
        for one in repeated:
            yield from _field(name, one)


def _field(name: str, value: object) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"{name}: {_scalar(value)}"
        return
    inner = list(_fields({str(k): v for k, v in value.items()}))
    if not inner:
        yield f"{name} {{ }}"
        return
    yield f"{name} {{"
    yield from (INDENT + line for line in inner)
    yield "}"


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Name):
        return str(value)
    if isinstance(value, str):
        return _quoted(value)
    raise TypeError(f"a {type(value).__name__} has no place in a text-format field")


def _quoted(text: str) -> str:
    """A string literal: everything but printable ASCII as octal escapes of its UTF-8 bytes, which all parsers read alike."""
    plain = (chr(b) if 32 <= b < 127 and chr(b) not in '"\\' else f"\\{b:03o}" for b in text.encode())
    return f'"{"".join(plain)}"'
