"""Selectors of nodes: one small grammar for --keep-float, --only, --quantize and --bits.

/encoder/fc*          nodes by name, a glob
re:fc[12]$            nodes by name, a regular expression (found anywhere in it)
op:Gemm  op:Conv*     nodes by operator type, a glob
region:FROM..TO       all nodes on paths between two nodes or tensors, ends included; either may be left open
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from qcompile.errors import UsageError
from qcompile.quant.spec import Scheme, integer_scheme

ORIGIN = "qcompile.origin"
"""Metadata of a node that replaces another: the name that the user knows."""


@dataclass(frozen=True)
class Selection:
    """The user's selectors by option: what stays in float, what alone is quantized, what is against the default, and widths."""

    keep_float: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()
    bits: tuple[str, ...] = ()
    _chosen: dict[tuple[str, int, int], frozenset[ir.Node]] = field(
        default_factory=dict[tuple[str, int, int], frozenset[ir.Node]], init=False, repr=False, compare=False
    )

    @property
    def by_option(self) -> dict[str, tuple[str, ...]]:
        """The selectors by the field's name."""
        return {"keep_float": self.keep_float, "only": self.only, "quantize": self.quantize, "bits": self.bits}

    @property
    def selectors(self) -> tuple[str, ...]:
        """All of them, without widths."""
        return (*self.keep_float, *self.only, *self.quantize, *(with_width(text)[0] for text in self.bits))

    def any_excluded(self, nodes: Iterable[ir.Node]) -> str | None:
        """Why one of `nodes` is left alone, or None."""
        return next((reason for node in nodes if (reason := self.excluded(node))), None)

    def without(self, names: Iterable[str]) -> Selection:
        """The same with the nodes of these names left alone too."""
        return replace(self, keep_float=(*self.keep_float, *map(exactly, names)))

    def excluded(self, node: ir.Node) -> str | None:
        """Why `node` is left alone, or None; --keep-float wins over --quantize, that over --only."""
        kept = self._chosen_by(self.keep_float, node)
        if kept is not None:
            return f"kept in float by --keep-float {kept}"
        if self.only and self.forced(node) is None and self._chosen_by(self.only, node) is None:
            return f"not selected by --only {','.join(self.only)}"
        return None

    def forced(self, node: ir.Node) -> str | None:
        """The --quantize selector that asks for `node` although the default leaves it in float, or None."""
        return self._chosen_by(self.quantize, node)

    def scheme_of(self, node: ir.Node, scheme: Scheme) -> Scheme:
        """`scheme` with the widths of the last --bits selector that chooses `node`."""
        for selector, widths in map(with_width, reversed(self.bits)):
            if node in self._selected(selector, node.graph):
                return replace(scheme, name=widths.name, weight=widths.weight, activation=widths.activation)
        return scheme

    def _chosen_by(self, selectors: Sequence[str], node: ir.Node) -> str | None:
        return next((s for s in selectors if node in self._selected(s, node.graph)), None)

    def _selected(self, selector: str, graph: ir.Graph | ir.Function | None) -> frozenset[ir.Node]:
        assert isinstance(graph, ir.Graph)
        key = (selector, id(graph), len(graph))
        if key not in self._chosen:
            self._chosen[key] = selected(selector, graph)
        return self._chosen[key]


def require_selector(text: str) -> None:
    """Guard for a selector's form.

    Raises:
        UsageError: not a regular expression, an empty operator type, or a region without ends.
    """
    kind, _, rest = text.partition(":")
    if not text:
        raise UsageError("a selector is empty; give a node name, op:TYPE, re:REGEX or region:FROM..TO")
    if kind == "re":
        _require_regex(text, rest)
    elif kind == "op" and not rest:
        raise UsageError(f"selector {text!r} names no operator type; write op:Gemm, say")
    elif kind == "region" and not any(_ends(rest)):
        raise UsageError(f"selector {text!r} has no ends; write region:FROM..TO, region:FROM.. or region:..TO")


def with_width(text: str) -> tuple[str, Scheme]:
    """SELECTOR=wXaY, what --bits takes: the selector, and the types of weights and activations.

    Raises:
        UsageError: no selector of a known form, or no width of 2 to 8 bits.
    """
    selector, _, width = text.rpartition("=")
    try:
        scheme = integer_scheme(width)
    except ValueError as e:
        raise UsageError(f"--bits {text!r}: {e}, for example --bits 'fc*=w4a4'") from e
    require_selector(selector)
    return selector, scheme


def selected(text: str, graph: ir.Graph) -> frozenset[ir.Node]:
    """The nodes of `graph` that a selector chooses; empty if it names nothing there."""
    kind, _, rest = text.partition(":")
    if kind == "region":
        return _region(graph, *_ends(rest))
    fits = _predicate(text)
    return frozenset(n for n in graph if fits(n))


def matches(pattern: str, name: str) -> bool:
    """Whether `name` fits a glob, or a regular expression after `re:`."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern) or pattern == name


def exactly(name: str) -> str:
    """The selector that chooses the nodes of this name and no others: to be shown, and typed again."""
    text = re.sub(r"([*?[])", r"[\1]", name)
    return f"[{text[0]}]{text[1:]}" if text.startswith(("re:", "op:", "region:")) else text


def _require_regex(text: str, regex: str) -> None:
    try:
        re.compile(regex)
    except re.error as e:
        raise UsageError(f"pattern {text!r} is not a regular expression ({e}); correct it") from e


def _predicate(text: str) -> Callable[[ir.Node], bool]:
    if text.startswith("op:"):
        return lambda n: fnmatch.fnmatchcase(n.op_type, text[3:])
    return lambda n: any(matches(text, name) for name in names(n))


def names(node: ir.Node) -> tuple[str, ...]:
    """The node's name, and that of the node that it replaces."""
    origin = node.metadata_props.get(ORIGIN)
    return (str(node.name),) if origin is None else (str(node.name), origin)


def _ends(text: str) -> tuple[str, str]:
    start, _, end = text.partition("..")
    return start, end


def _region(graph: ir.Graph, start: str, end: str) -> frozenset[ir.Node]:
    """Descendants of `start` that are ancestors of `end`; an open end is no limit."""
    found = frozenset(graph)
    if start:
        found &= _closure(_named(graph, start, _readers), lambda n: (u for v in n.outputs for u in _readers(v)))
    if end:
        found &= _closure(_named(graph, end, _writer), lambda n: (p for v in n.inputs if v is not None for p in _writer(v)))
    return found


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    return (node for node, _ in value.uses())


def _writer(value: ir.Value) -> Iterator[ir.Node]:
    producer = value.producer()
    return iter(() if producer is None else (producer,))


def _named(graph: ir.Graph, name: str, of_value: Callable[[ir.Value], Iterable[ir.Node]]) -> list[ir.Node]:
    """The nodes of that name, else those that read (or the one that writes) the tensor of that name."""
    nodes = [n for n in graph if name in names(n)]
    if nodes:
        return nodes
    values = [*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)]
    return [n for v in values if v.name == name for n in of_value(v)]


def _closure(starts: Iterable[ir.Node], step: Callable[[ir.Node], Iterable[ir.Node]]) -> frozenset[ir.Node]:
    seen, stack = set[ir.Node](), list(starts)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(step(node))
    return frozenset(seen)
