"""The source files of qcompile and what they import from each other, read from their text; nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Source:
    """A file: its module's dotted name, its room (ir, passes, cli ..), its syntax tree."""

    def __init__(self, path: Path) -> None:
        self.path = path.relative_to(ROOT)
        parts = (
            ("qcompile", *self.path.with_suffix("").parts) if self.path.parts[0] == "passes" else self.path.with_suffix("").parts
        )
        self.is_package = parts[-1] == "__init__"
        self.name = ".".join(parts[:-1] if self.is_package else parts)
        self.folder = ".".join(parts[:-1])
        self.room = "" if self.name == "qcompile" else parts[1]
        self.text = path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def calls(self) -> set[str]:
        """Names of what is called: `eval`, `onnx.load`."""
        return {ast.unparse(n.func) for n in ast.walk(self.tree) if isinstance(n, ast.Call)}

    @cached_property
    def imports(self) -> tuple[tuple[str, str], ...]:
        """(module, name) of every import anywhere in the file, `import a.b` as ("a.b", "")."""
        found: list[tuple[str, str]] = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.path}:{node.lineno}: write absolute imports"
                found += [(str(node.module), alias.name) for alias in node.names]
        return tuple(found)


def sources() -> dict[str, Source]:
    """Every file of qcompile/ and passes/ by its module's name."""
    ours = [p for p in sorted((ROOT / "qcompile").rglob("*.py")) if "passes" not in p.relative_to(ROOT / "qcompile").parts[:1]]
    read = [Source(p) for p in [*ours, *sorted((ROOT / "passes").rglob("*.py"))]]
    return {s.name: s for s in read}


def edges(known: Mapping[str, Source]) -> Iterator[tuple[Source, str, str]]:
    """(file, the module of ours that it imports, the name that it takes from there or "")."""
    for source in known.values():
        for module, name in source.imports:
            inner = f"{module}.{name}"
            if inner in known:
                yield source, inner, ""
            elif module.split(".")[0] == "qcompile":
                yield source, module, name


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (strongly connected components of more than one, Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in index:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            found.extend([sorted(group)] * (len(group) > 1))

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(found)
