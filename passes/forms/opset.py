"""opset: raise the default operator set to what the scheme needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from qcompile.ir.model import Model
from qcompile.ir.raising import raise_opset
from qcompile.pipeline.base import Kind, Pass, PassContext, PassResult, Stage


@dataclass(frozen=True)
class RaiseOpset(Pass):
    """Raise the opset to the lowest that the scheme needs on the target (19 for float16 scales, 21 for int4).

    before: opset 17;  ReduceMean {axes}      after: opset 19;  ReduceMean(x, axes)
    Uses onnx.version_converter, never the bare number; refuses what it cannot convert.
    """

    name = "opset"
    kind = Kind.EQUIVALENT
    needs = Stage.CANONICAL
    version: Annotated[int, "the opset to reach; 0 means the lowest that the scheme needs"] = 0

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Raises ModelError: the converter knows no way."""
        wanted = self.version or ctx.target.opset(ctx.scheme)
        if model.opset >= wanted:
            ctx.remarks.note("", f"opset {model.opset} is high enough ({wanted} is needed)")
            return PassResult(False)
        before = model.opset
        raise_opset(model, wanted)
        ctx.remarks.applied("", f"opset {before} raised to {wanted}")
        return PassResult(True)
