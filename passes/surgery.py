"""The user's own surgery: `--passes "my_surgery.py:fix_nms,repq"` runs a function on a graphsurgeon graph."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import onnx_graphsurgeon as gs

from qcompile.calib.observe.change import Changes
from qcompile.errors import ModelError, UsageError, VerifyError
from qcompile.ir.model import Model
from qcompile.ir.surgeon import from_gs, import_graph, surgery_kind, to_gs
from qcompile.ir.verify import verify_structure
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult, Stage


@dataclass(frozen=True)
class GraphSurgery(Pass):
    """Run your own function on the model as an onnx-graphsurgeon graph.

    before: any graph -> after: what `function(graph: gs.Graph)` makes of it, in place or returned.
    `@qcompile.surgery(kind="equivalent")` lets the result be verified; otherwise a new float baseline starts here.
    """

    name: ClassVar[str] = "surgery"
    kind: ClassVar[Kind] = Kind.EQUIVALENT
    needs: ClassVar[Stage] = Stage.SOURCE
    file: str = field(default="", metadata={"option": False})
    function: str = field(default="", metadata={"option": False})

    @classmethod
    def from_item(cls, name: str, given: dict[str, Any]) -> GraphSurgery:
        """The pass that `file.py:function` in a pipeline string stands for."""
        file, _, function = name.rpartition(":")
        return cls(file=file, function=function, **given)

    def spec_name(self) -> str:
        """How the pass is written in a pipeline string."""
        return f"{self.file}:{self.function}"

    @property
    def changes_function(self) -> bool:
        """Whether the float function is meant to change (the default, unless declared `equivalent`)."""
        return surgery_kind(self._load()) != "equivalent"

    def moves(self, model: Model, ctx: PassContext) -> Iterable[str]:
        """Every tensor: the function is free to do anything."""
        return _tensor_names(model)

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Replace `model`'s graph by what the function makes of it.

        Raises:
            UsageError: the file, the function or its result cannot be used.
            ModelError: graphsurgeon cannot carry the model.
        """
        new, remarks = import_graph(self._call(self._load(), to_gs(model)), model)
        self._check(new)
        if new.digest() == from_gs(to_gs(model), model).digest():
            ctx.remarks.missed(self.spec_name(), "the function changed nothing")
            return PassResult(False)
        old = frozenset(_tensor_names(model))
        self._report(ctx, model, new, remarks)
        model.ir = new.ir
        return PassResult(True, Changes(moved={*old, *_tensor_names(model)}))

    def _load(self) -> Callable[[gs.Graph], object]:
        path = Path(self.file)
        if not path.is_file():
            raise UsageError(f"no surgery file at {self.file}: check the path (it is relative to the current folder)")
        module = _module(path.resolve(), path.stat().st_mtime_ns)
        function = getattr(module, self.function, None)
        if not callable(function):
            raise UsageError(f"{self.file} has no function {self.function!r}; define it, or name another after the ':'")
        return function

    def _call(self, function: Callable[[gs.Graph], object], graph: gs.Graph) -> gs.Graph:
        try:
            with redirect_stdout(sys.stderr):
                result = function(graph)
        except Exception as e:
            raise _blame(Path(self.file), e) from e
        result = graph if result is None else result
        if not isinstance(result, gs.Graph):
            raise UsageError(f"{self.spec_name()} returned {type(result).__name__}; return the gs.Graph or nothing")
        return self._tidied(result)

    def _tidied(self, graph: gs.Graph) -> gs.Graph:
        try:
            return graph.cleanup().toposort()
        except Exception as e:
            raise UsageError(f"{self.spec_name()} left a graph that cannot be sorted ({e}); correct the function") from e

    def _check(self, new: Model) -> None:
        try:
            verify_structure(new, self.spec_name())
        except VerifyError as e:
            raise UsageError(f"the surgery broke the graph: {str(e).partition(';')[0]}; correct the function") from e
        if not len(new.graph) or not new.graph.outputs:
            raise ModelError(f"{self.spec_name()} left an empty graph; keep the graph's outputs connected")

    def _report(self, ctx: PassContext, old: Model, new: Model, remarks: list[str]) -> None:
        for remark in remarks:
            ctx.remarks.note(self.spec_name(), remark)
        if surgery_kind(self._load()) is None:
            ctx.remarks.note(self.spec_name(), "not declared with @qcompile.surgery: taken as a change of the float function")
        was, now = ({n.name for n in m.graph.all_nodes()} for m in (old, new))
        ctx.remarks.applied(
            self.spec_name(), "graph or constants changed", nodes_added=len(now - was), nodes_removed=len(was - now)
        )


@cache
def _module(path: Path, mtime_ns: int) -> ModuleType:
    """The user's file as a module; `mtime_ns` makes an edited file load again."""
    spec = importlib.util.spec_from_file_location(f"qcompile_surgery_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        with redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except Exception as e:
        raise _blame(path, e) from e
    return module


def _blame(path: Path, error: Exception) -> UsageError:
    """An error that names the line of the user's file, not ours."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == path.resolve()]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = f"{path}:{line}" if line is not None else str(path)
    return UsageError(f"{where}: {type(error).__name__}: {error}; correct the surgery and run again")


def _tensor_names(model: Model) -> list[str]:
    values = [*model.graph.inputs, *(v for node in model.graph.all_nodes() for v in node.outputs)]
    return [str(v.name) for v in values if v.name]
