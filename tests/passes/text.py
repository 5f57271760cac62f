"""Models written by hand: the printer's form, read back, with weights that are named and drawn from one generator.

    weights seed 0
      scale, shift = normal[16] * 0.3
      w = normal[16, 48] * 0.3
    graph opset=17 (x: FLOAT[N,5,16]) -> (y: FLOAT[N,5,48])
      n = LayerNormalization(x, scale, shift) {axis=-1} @norm
      h = MatMul(n, w) @fc
      y = Mul(h, const<float32[]: 0.5>) @half

Each name draws anew, in the order of the lines.  A term is a number, normal[shape], uniform(low, high)[shape] or exp(term).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx_ir.passes.common import ShapeInferencePass

from qcompile.decide.decisions import lines
from qcompile.ir.model import Model
from qcompile.ir.text import print_model, summary

Array = NDArray[Any]
_CONSTANT = re.compile(r"const<(\w+)\[([\d, ]*)\]: ([^>]*)>")
_NODE = re.compile(r"(?P<outs>.+?) = (?:(?P<domain>[\w.]+)::)?(?P<op>\w+)\((?P<ins>.*)\)(?: \{(?P<attrs>.*)\})? @(?P<name>\S*)")
_ATTRIBUTE = re.compile(r"(\w+)=(\([^)]*\)|const<[^>]*>|\S+)")
_GRAPH = re.compile(r"graph opset=(\d+) \((.*)\) -> \((.*)\)")


@dataclass(frozen=True)
class Written:
    """A model that was read, and how its constants are spelled there."""

    model: Model
    spelled: dict[str, str]

    def print(self, other: Model, *, decisions: bool = True) -> str:
        """`other` as text: constants that this model has too are spelled as they are here, scaled ones as `w * r`."""
        constants = {n: _array(v) for n, v in self.model.graph.initializers.items()}

        def spell(value: ir.Value) -> str:
            array = _array(value)
            first = [n for n in (str(value.name),) if n in constants]
            same = [n for n in (*first, *constants) if _equal(constants[n], array)]
            if same:
                return self.spelled[same[0]]
            scaled = (f"{self.spelled[n]} * {r}" for n, c in constants.items() if (r := _ratio(c, array)) is not None)
            return next(scaled, summary(value))

        return print_model(other, lines if decisions else lambda _: (), spell)


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()


def _equal(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _ratio(old: Array, new: Array) -> str | None:
    """The factor, or those along one axis, by which a matrix or kernel was scaled, printed; None if it was not."""
    if old.shape != new.shape or old.ndim < 2 or old.dtype != new.dtype or old.dtype.kind != "f" or not np.all(old):
        return None
    factors = new.astype(np.float64) / old
    alike = [tuple(range(old.ndim)), *(tuple(i for i in range(old.ndim) if i != axis) for axis in range(old.ndim))]
    for axes in alike:
        row = np.median(factors, axes, keepdims=len(axes) < old.ndim)
        if np.allclose(factors, row, rtol=1e-5, atol=0):
            return summary(ir.Value(name="r", const_value=ir.Tensor(np.asarray(row, old.dtype))))
    return None


def read_model(text: str) -> Written:
    """A model from its weights and its graph."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    start = next(i for i, line in enumerate(lines) if line.startswith("graph "))
    weights = _weights(lines[:start]) if start else {}
    opset, inputs, outputs = _matched(_GRAPH, lines[start]).groups()
    literals: dict[str, str] = {}
    nodes = [_node(line, int(opset), literals) for line in lines[start + 1 :]]
    constants = weights | {name: _literal(spelling) for name, spelling in literals.items()}
    tensors = [numpy_helper.from_array(a, n) for n, a in constants.items()]
    graph = helper.make_graph(nodes, "g", list(_values(inputs)), list(_values(outputs)), tensors)
    domains = {n.domain for n in nodes} - {""}
    opsets = [helper.make_opsetid("", int(opset)), *(helper.make_opsetid(d, 1) for d in sorted(domains))]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    model = Model.from_proto(onnx.shape_inference.infer_shapes(proto))
    ShapeInferencePass()(model.ir)
    return Written(model, {n: n for n in weights} | literals)


def _matched(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    found = pattern.fullmatch(text)
    assert found is not None, f"cannot be read: {text}"
    return found


def _values(text: str) -> Iterator[onnx.ValueInfoProto]:
    for name, dtype, dims in re.findall(r"([^\s:,]+): (\w+)(?:\[([^\]]*)\])?", text):
        shape = [int(d) if d.isdigit() else d for d in dims.split(",") if d]
        yield helper.make_tensor_value_info(name, getattr(onnx.TensorProto, dtype), shape)


def _weights(lines: list[str]) -> dict[str, Array]:
    rng = np.random.default_rng(int(_matched(re.compile(r"weights seed (\d+)"), lines[0]).group(1)))
    made: dict[str, Array] = {}
    for line in lines[1:]:
        names, scales, formula = _matched(re.compile(r"(.+?) (\*?)= (.+)"), line).groups()
        for name in names.split(", "):
            made[name] = (made[name] * _product(formula, rng) if scales else _product(formula, rng)).astype(np.float32)
    return made


def _product(formula: str, rng: np.random.Generator) -> Array:
    return prod((_term(t, rng) for t in formula.split(" * ")), start=np.float64(1))  # type: ignore[return-value]


def _term(term: str, rng: np.random.Generator) -> Array:
    if term.startswith("exp("):
        return np.exp(_term(term[4:-1], rng))
    if term.startswith("const<"):
        return _literal(term)
    kind, shape = _matched(re.compile(r"([^\[]+)(\[[\d, ]*\])?"), term).groups()
    if shape is None:
        return np.asarray(float(term))
    size = tuple(int(d) for d in re.findall(r"\d+", shape))
    if kind == "normal":
        return rng.standard_normal(size)
    low, high = re.findall(r"[-\d.]+", _matched(re.compile(r"uniform\(.+\)"), kind).group())
    return rng.uniform(float(low), float(high), size)


def _literal(text: str) -> Array:
    dtype, shape, numbers = _matched(_CONSTANT, text).groups()
    array = np.array([float(x) if dtype.startswith("f") else int(x) for x in numbers.split(",") if x.strip()], dtype)
    return array.reshape([int(d) for d in re.findall(r"\d+", shape)])


def _node(line: str, opset: int, literals: dict[str, str]) -> onnx.NodeProto:
    found = _matched(_NODE, line)
    ins: list[str] = []
    for i, (literal, name) in enumerate(re.findall(r"(const<[^>]*>)|([^\s,]+)", found["ins"])):
        ins.append(f"{found['name']}_in{i}" if literal else name.removeprefix("-"))
        literals |= {ins[-1]: literal} if literal else {}
    outs = [out.removeprefix("-") for out in found["outs"].split(", ")]
    node = helper.make_node(found["op"], ins, outs, name=found["name"], domain=found["domain"] or "")
    for name, text in _ATTRIBUTE.findall(found["attrs"] or ""):
        node.attribute.append(_attribute(node, opset, name, text))
    return node


def _attribute(node: onnx.NodeProto, opset: int, name: str, text: str) -> onnx.AttributeProto:
    """The operator's schema says whether 1 is an integer or a float."""
    kind = onnx.defs.get_schema(node.op_type, opset, node.domain).attributes[name].type.name
    if kind == "TENSOR":
        return helper.make_attribute(name, numpy_helper.from_array(_literal(text)))
    read = {"INT": int, "FLOAT": float, "STRING": str}[kind.removesuffix("S")]
    parts = [read(p.strip()) for p in text.strip("()").split(",") if p.strip()]
    return helper.make_attribute(name, parts if kind.endswith("S") and kind != "S" else parts[0])
