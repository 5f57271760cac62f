"""Selectors of nodes: one small grammar for --keep-float, --only, --quantize and --bits.

/encoder/fc*          nodes by name, a glob
re:fc[12]$            nodes by name, a regular expression (found anywhere in it)
op:Gemm  op:Conv*     nodes by operator type, a glob
region:FROM..TO       all nodes on paths between two nodes or tensors, ends included; either may be left open
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator

import onnx_ir as ir

from qcompile.errors import UsageError
from qcompile.quant.spec import Scheme, integer_scheme

ORIGIN = "qcompile.origin"
"""Metadata of a node that replaces another: the name that the user knows."""


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
