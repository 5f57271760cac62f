"""What the lowering to integers writes with: fixed-point tensors, and an emitter of integer nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.decide.quantizer import Quantizer
from qcompile.errors import ModelError
from qcompile.ir.edit import add_constant, new_node
from qcompile.ir.ops import const_array
from qcompile.ir.select import ORIGIN
from qcompile.pipeline.base import PassContext

INT4, INT8, INT16 = ir.DataType.INT4, ir.DataType.INT8, ir.DataType.INT16
INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64
UINT64, BOOL = ir.DataType.UINT64, ir.DataType.BOOL
Reals = NDArray[np.float64]
UNBOUNDED = (-math.inf, math.inf)


@dataclass(frozen=True)
class Format:
    """Codes lo..hi of a stored tensor: real = (code - zero) * scale.  Held in int8 if they fit, else in int32."""

    scale: float
    zero: int
    lo: int
    hi: int

    @property
    def dtype(self) -> ir.DataType:
        """The container (ONNX Runtime has no Clip for int16)."""
        return INT8 if self.lo >= -128 and self.hi <= 127 else INT32

    def scaled(self, factor: float) -> Format:
        """The same codes for values `factor` times as large."""
        return replace(self, scale=self.scale * factor)

    def code(self, x: NDArray[Any] | float) -> NDArray[np.int64]:
        """Codes of constants, saturated."""
        with np.errstate(over="ignore"):  # what stands for -inf ends at the lowest code
            wide = np.rint(np.clip(np.asarray(x, np.float64) / self.scale, -(2.0**40), 2.0**40)) + self.zero
        return np.clip(wide, self.lo, self.hi).astype(np.int64)


def format_of(quantizer: Quantizer) -> Format:
    """The format that a quantizer describes."""
    params, qtype = quantizer.known, quantizer.spec.qtype
    return Format(float(params.scale), int(params.zero_point), int(qtype.qmin), int(qtype.qmax))


@dataclass(frozen=True, eq=False)
class Fixed:
    """An integer tensor that stands for real = clip((value - zero) * scale, clamp); lo <= value <= hi.

    `scale` is float64 of shape [] or broadcastable to the tensor; the clamp (of a Relu or Clip) waits for the next rounding.
    """

    value: ir.Value
    scale: Reals
    lo: int
    hi: int
    zero: int = 0
    clamp: tuple[float, float] = UNBOUNDED

    @property
    def magnitude(self) -> int:
        """Bound of |value - zero|."""
        return max(abs(self.lo - self.zero), abs(self.hi - self.zero))

    @property
    def is_scalar(self) -> bool:
        """Whether one scale serves the whole tensor, so that elements may be moved."""
        return self.scale.size == 1

    def is_stored(self) -> bool:
        """Whether it is codes of a stored tensor, not an accumulator."""
        return self.is_scalar and self.lo >= -(1 << 15) and self.hi < 1 << 15

    def follows(self, fmt: Format) -> bool:
        """Whether the integers are codes of `fmt` already."""
        same = self.is_scalar and float(self.scale.reshape(-1)[0]) == fmt.scale and self.zero == fmt.zero
        return same and self.lo >= fmt.lo and self.hi <= fmt.hi and self.clamp == UNBOUNDED

    def times(self, factor: Reals) -> Fixed:
        """The same integers for values `factor` times as large."""
        low, high = (np.asarray(c * factor) if math.isfinite(c) else np.asarray(c) for c in self.clamp)
        if factor.size == 1 and float(factor.reshape(-1)[0]) > 0:
            f = float(factor.reshape(-1)[0])
            return replace(self, scale=self.scale * f, clamp=(float(low.reshape(-1)[0]), float(high.reshape(-1)[0])))
        assert self.clamp == UNBOUNDED
        return replace(self, scale=self.scale * factor)


@dataclass
class Emitter:
    """Appends integer nodes to the graph; `fixed` maps each float tensor to the integers that replace it."""

    graph: ir.Graph
    ctx: PassContext
    fixed: dict[ir.Value, Fixed] = field(default_factory=dict[ir.Value, Fixed])
    at: str = ""
    codes: dict[tuple[ir.Value, Format], Fixed] = field(default_factory=dict[tuple[ir.Value, Format], Fixed])
    _constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = field(
        default_factory=dict[tuple[str, tuple[int, ...], bytes], ir.Value]
    )

    def emit(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType,
        attributes: Mapping[str, Any] | None = None,
        outputs: int = 1,
    ) -> ir.Value:
        """Append one node named after the float node it comes from; returns its first output."""
        node = new_node(self.graph, op, inputs, name=f"{self.at}_{op}", attributes=dict(attributes or {}), outputs=outputs)
        node.metadata_props[ORIGIN] = self.at
        for out in node.outputs:
            out.type = ir.TensorType(dtype)
        self.graph.append(node)
        return node.outputs[0]

    def const(self, array: NDArray[Any] | int, dtype: ir.DataType) -> ir.Value:
        """An integer initializer; equal ones are shared."""
        exact = np.asarray(array)
        typed = exact.astype(dtype.numpy())
        assert np.array_equal(typed.astype(object), exact.astype(object)), "a constant does not fit into its type"
        key = (dtype.name, typed.shape, typed.tobytes())
        if key not in self._constants:
            self._constants[key] = add_constant(self.graph, f"{self.at}_{dtype.name.lower()}", typed, dtype)
        return self._constants[key]

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` in `dtype`; nothing if it is already."""
        return value if value.dtype == dtype else self.emit("Cast", [value], dtype, {"to": int(dtype)})

    def read(self, value: ir.Value | None) -> Fixed:
        """The integers of a float tensor; a constant gets 16-bit codes on a scale of its own.

        Raises:
            ModelError: nothing integer stands for it.
        """
        assert value is not None
        found = self.fixed.get(value)
        if found is None:
            found = self.fixed[value] = self._constant(value)
        return found

    def _constant(self, value: ir.Value) -> Fixed:
        array = const_array(value)
        if array is None:
            raise ModelError(f"tensor {value.name!r} has no integer form; report the model, or compile for --target ort")
        top = float(np.abs(array.astype(np.float64)).max(initial=0.0))
        fmt = Format(top / 32767 if top > 0 else 1.0, 0, -32767, 32767)
        return Fixed(self.const(fmt.code(array), INT16), np.asarray(fmt.scale), fmt.lo, fmt.hi)
