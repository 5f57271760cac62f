"""Operators on integer codes, and TensorRT's own Q and DQ, as standard Q/DQ nodes around float operators.

QLinearConv(x, s_x, z_x, w, s_w, z_w, s_y, z_y, b)   ->   Q(Conv(DQ(x), DQ(w), DQ(b, s_x s_w)), s_y, z_y)
A kernel for codes rescales its int32 sums and rounds once; so does the float operator between DQ and Q, up to a code on ties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.errors import ModelError
from qcompile.ir.edit import add_constant, drop_if_unused, fresh_name, replace_value
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array, input_at, int_attr
from qcompile.ir.raising import raise_opset

_AXES_INPUT = 18  # of ReduceMean
_PER_AXIS = 13  # the opset from which on DQ has an axis
_OURS, _TRT = ("", "com.microsoft"), "trt"
_TENSORRT = {  # TensorRT's operators: the standard one, and the type of the codes
    "TRT_FP8QuantizeLinear": ("QuantizeLinear", ir.DataType.FLOAT8E4M3FN),
    "TRT_FP8DequantizeLinear": ("DequantizeLinear", ir.DataType.FLOAT8E4M3FN),
    "TRT_INT4QuantizeLinear": ("QuantizeLinear", ir.DataType.INT4),
    "TRT_INT4DequantizeLinear": ("DequantizeLinear", ir.DataType.INT4),
}
_WIDE_CODES = frozenset({ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.INT4, ir.DataType.UINT4})
_WIDE_OPSET, _FP8_OPSET = 21, 19


@dataclass
class _Writer:
    """Writes nodes in front of `node`."""

    graph: ir.Graph
    node: ir.Node
    opset: int

    def at(self, slot: int) -> ir.Value | None:
        return input_at(self.node, slot)

    def need(self, slot: int) -> ir.Value:
        value = self.at(slot)
        if value is None:
            raise ModelError(f"{self.node.op_type} {self.node.name!r} lacks its input {slot}; export the model again")
        return value

    def add(self, op: str, inputs: Sequence[ir.Value | None], suffix: str, dtype: ir.DataType, **attributes: Any) -> ir.Value:
        name = fresh_name(self.graph, f"{self.node.name}_{suffix}")
        made = ir.node(op, inputs, attributes, name=name, num_outputs=1)
        made.outputs[0].name = fresh_name(self.graph, f"{name}_out")
        made.outputs[0].type = ir.TensorType(dtype)
        self.graph.insert_before(self.node, made)
        return made.outputs[0]

    def dequantized(self, slot: int, suffix: str, axis: int = 1) -> ir.Value:
        """DQ of codes, scale and zero point at `slot` and behind it."""
        scale, zero = self.need(slot + 1), self.at(slot + 2)
        array = const_array(scale)
        per_axis = {"axis": axis} if array is None or array.size > 1 else {}
        if array is not None and array.ndim and array.size == 1:
            scale, zero = self.scalar(scale), None if zero is None else self.scalar(zero)
        elif array is not None and array.ndim > 1:
            scale, zero = self.scalar(scale, (-1,)), None if zero is None else self.scalar(zero, (-1,))
        return self.add(
            "DequantizeLinear", [self.need(slot), scale, self._full(zero, array)], suffix, ir.DataType.FLOAT, **per_axis
        )

    def _full(self, zero: ir.Value | None, scale: np.ndarray | None) -> ir.Value | None:
        """One zero point for each scale."""
        array = None if zero is None else const_array(zero)
        if zero is None or array is None or scale is None or scale.size == array.size:
            return zero
        return add_constant(self.graph, f"{zero.name}_full", np.full(scale.size, array.reshape(-1)[0]), zero.dtype)

    def scalar(self, value: ir.Value, shape: tuple[int, ...] = ()) -> ir.Value:
        array = const_array(value)
        return value if array is None else add_constant(self.graph, f"{value.name}_flat", array.reshape(shape), value.dtype)

    def quantized(self, value: ir.Value, slot: int) -> None:
        """Q of `value` with the scale at `slot` in the place of the node."""
        scale, zero = self.scalar(self.need(slot)), self.at(slot + 1)
        codes = ir.DataType.UINT8 if zero is None else (zero.dtype or ir.DataType.UINT8)
        inputs = [value, scale, *([] if zero is None else [self.scalar(zero)])]
        self.finish(self.add("QuantizeLinear", inputs, "QuantizeLinear", codes))

    def finish(self, made: ir.Value) -> None:
        """Let `made` take the node's place and name."""
        old, name = self.node.outputs[0], self.node.outputs[0].name
        made.shape = old.shape if made.shape is None else made.shape
        interface, inputs = old.is_graph_output(), [v for v in self.node.inputs if v is not None]
        replace_value(self.graph, old, made)
        if not interface:
            old.name, made.name = None, name
        self.graph.remove(self.node, safe=True)
        for value in inputs:
            drop_if_unused(self.graph, value)

    def bias(self, slot: int, x_scale: int, w_scale: int) -> ir.Value | None:
        """int32 codes of the scale s_x s_w, as floats."""
        codes, x, w = (None if v is None else const_array(v) for v in (self.at(slot), self.at(x_scale), self.at(w_scale)))
        if self.at(slot) is None:
            return None
        if codes is None or x is None or w is None:
            raise ModelError(f"{self.node.op_type} {self.node.name!r} has a bias that is no constant; export the model again")
        alpha = self.node.attributes["alpha"].as_float() if "alpha" in self.node.attributes else 1.0
        scale = x.reshape(-1).astype(np.float32) * w.reshape(-1).astype(np.float32) * np.float32(alpha)
        return add_constant(self.graph, f"{self.node.name}_bias", codes.astype(np.float32) * scale)

    def attributes(self, *names: str) -> dict[str, Any]:
        return {a: self.node.attributes[a].value for a in names if a in self.node.attributes}


def spell_qdq(model: Model) -> list[str]:
    """Rewrite all such operators of `model`, in place; their names.  The opset is raised to the one that their types need.

    Raises:
        ModelError: one that standard operators cannot express here.
    """
    found = [n for n in model.graph.all_nodes() if is_readable(n)]
    if found and model.opset < (wanted := max(map(_opset, found))):
        raise_opset(model, wanted)
    done: list[str] = []
    for graph in model.ir.graphs():
        for node in [n for n in graph if is_readable(n)]:
            done.append(str(node.name))
            _rewrite(_Writer(graph, node, model.opset))
    return done


def _opset(node: ir.Node) -> int:
    """What the standard operators need that the node becomes."""
    wide = node.domain == _TRT and _TENSORRT[node.op_type][1] in _WIDE_CODES
    return _WIDE_OPSET if wide else _FP8_OPSET if node.domain == _TRT else _PER_AXIS


def is_readable(node: ir.Node) -> bool:
    """Whether `spell_qdq` rewrites the node."""
    if node.domain == _TRT:
        return node.op_type in _TENSORRT
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return node.domain == "com.microsoft" and _standard(node)
    return node.domain in _OURS and node.op_type in _OPERATORS


def _standard(node: ir.Node) -> bool:
    """Whether the standard operator has the node's types at this opset."""
    opset = node.graph.opset_imports.get("", 0) if isinstance(node.graph, ir.Graph) else 0
    return opset >= _WIDE_OPSET or not any(v is not None and v.dtype in _WIDE_CODES for v in (*node.inputs, *node.outputs))


def _rewrite(line: _Writer) -> None:
    node = line.node
    if node.domain == _TRT:
        _tensorrt(line)
    elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        node.domain = ""
    else:
        if int_attr(node, "channels_last", 0):
            raise ModelError(
                f"{node.op_type} {node.name!r} is channels-last, which qcompile does not read; start from the float model"
            )
        _OPERATORS[node.op_type](line)


def _tensorrt(line: _Writer) -> None:
    """Q or DQ of a type that TensorRT's operator implies."""
    node = line.node
    op, codes = _TENSORRT[node.op_type]
    zero = line.at(2)
    if zero is None:
        scale = const_array(node.inputs[1])
        zero = add_constant(
            line.graph, f"{node.name}_zero_point", np.zeros(() if scale is None else scale.shape, codes.numpy()), codes
        )
    made = codes if op == "QuantizeLinear" else (line.need(1).dtype or ir.DataType.FLOAT)
    line.finish(line.add(op, [line.need(0), line.need(1), zero], op, made, **line.attributes("axis", "block_size")))


def _conv(line: _Writer) -> None:
    names = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    inputs = [line.dequantized(0, "x"), line.dequantized(3, "w", axis=0), line.bias(8, 1, 4)]
    line.quantized(_float(line, "Conv", inputs, *names), 6)


def _matmul(line: _Writer) -> None:
    weight = line.node.inputs[3]
    rank = len(weight.shape) if weight is not None and weight.shape is not None else 2
    line.quantized(_float(line, "MatMul", [line.dequantized(0, "a"), line.dequantized(3, "b", axis=rank - 1)]), 6)


def _gemm(line: _Writer) -> None:
    axis = 0 if int_attr(line.node, "transB", 0) else 1
    inputs = [line.dequantized(0, "a"), line.dequantized(3, "b", axis=axis), line.bias(6, 1, 4)]
    made = _float(line, "Gemm", inputs, "alpha", "transA", "transB")
    if line.at(7) is None:
        line.finish(made)
    else:
        line.quantized(made, 7)


def _binary(op: str) -> Callable[[_Writer], None]:
    def rewrite(line: _Writer) -> None:
        line.quantized(_float(line, op, [line.dequantized(0, "a"), line.dequantized(3, "b")]), 6)

    return rewrite


def _unary(op: str, *attributes: str) -> Callable[[_Writer], None]:
    def rewrite(line: _Writer) -> None:
        line.quantized(_float(line, op, [line.dequantized(0, "x")], *attributes), 3)

    return rewrite


def _softmax(line: _Writer) -> None:
    old = int_attr(line.node, "opset", _PER_AXIS) < _PER_AXIS
    if old and int_attr(line.node, "axis", 1) != -1:
        raise ModelError(f"QLinearSoftmax {line.node.name!r} flattens its axes (opset below 13); start from the float model")
    _unary("Softmax", "axis")(line)


def _mean(line: _Writer) -> None:
    if line.opset >= _AXES_INPUT and "axes" in line.node.attributes:
        axes = add_constant(line.graph, f"{line.node.name}_axes", np.array(line.node.attributes["axes"].as_ints(), np.int64))
        made = line.add("ReduceMean", [line.dequantized(0, "x"), axes], "float", ir.DataType.FLOAT, **line.attributes("keepdims"))
        line.quantized(made, 3)
        return
    _unary("ReduceMean", "axes", "keepdims")(line)


def _concat(line: _Writer) -> None:
    parts: list[ir.Value | None] = [line.dequantized(slot, f"x{slot}") for slot in range(2, len(line.node.inputs), 3)]
    line.quantized(_float(line, "Concat", parts, "axis"), 0)


def _where(line: _Writer) -> None:
    line.quantized(_float(line, "Where", [line.at(0), line.dequantized(1, "x"), line.dequantized(4, "y")]), 7)


def _float(line: _Writer, op: str, inputs: list[ir.Value | None], *attributes: str) -> ir.Value:
    """The float operator, under the name of the node."""
    while inputs and inputs[-1] is None:
        inputs.pop()
    made = line.add(op, inputs, "float", ir.DataType.FLOAT, **line.attributes(*attributes))
    node = made.producer()
    assert node is not None
    node.name, line.node.name = line.node.name, node.name
    return made


_OPERATORS: dict[str, Callable[[_Writer], None]] = {
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
    "QGemm": _gemm,
    "QLinearAdd": _binary("Add"),
    "QLinearMul": _binary("Mul"),
    "QLinearSigmoid": _unary("Sigmoid"),
    "QLinearLeakyRelu": _unary("LeakyRelu", "alpha"),
    "QLinearAveragePool": _unary("AveragePool", "auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides"),
    "QLinearGlobalAveragePool": _unary("GlobalAveragePool"),
    "QLinearReduceMean": _mean,
    "QLinearSoftmax": _softmax,
    "QLinearConcat": _concat,
    "QLinearWhere": _where,
}
