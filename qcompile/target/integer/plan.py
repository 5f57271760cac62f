"""How a float graph falls into steps that integers can do; placement and lowering read the same plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from qcompile.errors import ModelError
from qcompile.ir.ops import const_array, const_scalar, input_at, is_const, is_op, static_shape, weight_slot
from qcompile.ir.optable import ops_with
from qcompile.structure.activation import find_activations
from qcompile.structure.core import data_uses
from qcompile.structure.norm import Norm, find_norms
from qcompile.target.integer.groups import groups_of
from qcompile.target.integer.refusals import refusal
from qcompile.target.integer.rules import KEPT

Family = Literal[
    "keep", "linear", "product", "add", "offset", "scale", "multiply", "clamp", "table", "norm", "softmax",
    "maxpool", "avgpool", "sum", "root", "divide", "move", "concat", "where", "extreme", "from-int", "lookup", "border",
    "refused",
]  # fmt: skip
_SELECTS = frozenset({"Slice", "Split", "Gather", "Pad"})
_MOVES = ops_with("reshapes") | _SELECTS | {"Expand", "Resize", "Tile", "Transpose"}
_TABLES = ops_with("unary") - {"Relu"}
_ACTIVATION_CLAMPS = ("relu", "relu6", "prelu")
_ROUNDING = frozenset({"add", "offset", "table", "lookup", "norm", "softmax", "concat", "where", "extreme", "divide"})
_EXACT = frozenset({"linear", "product", "sum", "multiply", "avgpool"})
_NAMED = 8
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16)


@dataclass(frozen=True, eq=False)
class Step:
    """`nodes` together compute `outputs` from `source`; the last one is `node`; `info` is a Norm for norms."""

    family: Family
    nodes: tuple[ir.Node, ...]
    source: ir.Value | None
    reason: str = ""
    info: Norm | None = None

    @property
    def node(self) -> ir.Node:
        """The node that makes the output."""
        return self.nodes[-1]

    @property
    def output(self) -> ir.Value:
        """The first output."""
        return self.node.outputs[0]


@dataclass
class Plan:
    """Steps in graph order; `of` maps each node to the step that it belongs to."""

    steps: list[Step] = field(default_factory=list[Step])
    of: dict[ir.Node, Step] = field(default_factory=dict[ir.Node, Step])

    def add(self, step: Step) -> None:
        """Note a step."""
        self.of.update(dict.fromkeys(step.nodes, step))

    @property
    def refused(self) -> list[Step]:
        """What has no integer form."""
        return [s for s in self.steps if s.family == "refused"]

    def require(self, excluded: Iterable[tuple[ir.Node, str]] = ()) -> None:
        """Raises ModelError: something has no integer form, or is `excluded` with a reason."""
        refused = [*((s.node, s.reason) for s in self.refused), *excluded]
        if not refused:
            return
        named = "; ".join(f"{node.op_type} {node.name!r}: {reason}" for node, reason in refused[:_NAMED])
        more = f"; and {len(refused) - _NAMED} more" if len(refused) > _NAMED else ""
        raise ModelError(f"the model has no integer-only form: {named}{more}; change these nodes, or compile for --target ort")


def plan(graph: ir.Graph) -> Plan:
    """Classify every node: norms and activation functions as a whole, the others one by one."""
    out = Plan()
    for norm in find_norms(graph):
        if _closed(norm.nodes, norm.output):
            out.add(Step("norm", norm.nodes, norm.input, _unknown(norm), norm))
    for act in find_activations(graph):
        if act.kind not in _ACTIVATION_CLAMPS and _closed(act.nodes, act.output) and not any(n in out.of for n in act.nodes):
            out.add(Step("table", act.nodes, act.input))
    for node in graph:
        if node not in out.of:
            out.add(_single(node))
        if out.of[node].node is node:
            out.steps.append(out.of[node])
    out.steps = [Step("refused", s.nodes, s.source, s.reason) if s.reason else s for s in out.steps]
    out.of.update({n: s for s in out.steps for n in s.nodes})
    return out


def _unknown(norm: Norm) -> str:
    """Why the number of elements that a norm averages over is not known."""
    if norm.kind != "group":
        return "" if norm.channels is not None else "the number of channels is unknown"
    groups = groups_of(norm)
    return groups if isinstance(groups, str) else ""


def _closed(nodes: tuple[ir.Node, ...], output: ir.Value) -> bool:
    """Whether nobody outside reads an intermediate value."""
    inside = set(nodes)
    values = [v for n in nodes for v in n.outputs if v is not output]
    return all(not v.is_graph_output() and all(u in inside for u, _ in v.uses()) for v in values)


def _single(node: ir.Node) -> Step:
    source = node.inputs[0] if node.inputs else None
    if is_border(node):
        return Step("border", (node,), source)
    reason = refusal(node)
    family = _family(node)
    if family is None or reason:
        return Step("refused", (node,), source, reason or f"{node.op_type} has no integer form here")
    if family == "keep" and node.op_type not in KEPT:
        return Step("refused", (node,), source, f"{node.op_type} on integers is not an operator of this target")
    return Step(family, (node,), source)


def _family(node: ir.Node) -> Family | None:
    if is_op(node, "Constant"):
        return "keep"
    if not any(is_float(v) for v in node.outputs):
        reads_numbers = any(is_float(v) and not is_const(v) for v in node.inputs) and not is_op(node, "Shape", "Size")
        return None if reads_numbers else "keep"
    if node.domain:
        return None
    if is_op(node, "MatMul", "Gemm", "Conv"):
        return "product" if weight_slot(node) is None else "linear"
    if is_op(node, "Add", "Sub", "Mul", "Div"):
        return _arithmetic(node)
    if is_op(node, "Sqrt") and _of_sum(node):
        return "root"
    if node.op_type in _TABLES:
        return "table" if counted(node) is None else "lookup"
    return _others(node)


def _others(node: ir.Node) -> Family | None:
    names: dict[str, Family] = {
        "Relu": "clamp", "Clip": "clamp", "Softmax": "softmax", "MaxPool": "maxpool", "AveragePool": "avgpool",
        "GlobalAveragePool": "sum", "ReduceMean": "sum", "ReduceSum": "sum", "Concat": "concat", "Where": "where",
        "Cast": "from-int", "Max": "extreme", "Min": "extreme",
        "GlobalMaxPool": "maxpool", "ReduceMax": "maxpool", "ReduceMin": "maxpool",
    }  # fmt: skip
    if node.op_type in _MOVES:
        return "move"
    if is_op(node, "Cast") and is_float(node.inputs[0]):
        return None
    return names.get(node.op_type)


def _arithmetic(node: ir.Node) -> Family | None:
    constants = [is_const(v) for v in node.inputs[:2]]
    if is_op(node, "Add", "Sub"):
        return "offset" if any(constants) else "add"
    if is_op(node, "Div"):
        return "scale" if constants[1] else None if constants[0] else "divide"
    return "scale" if any(constants) else "multiply"


def _of_sum(root: ir.Node) -> bool:
    """Whether a square root reads a sum (plus an epsilon): wide integers, too many for a table."""
    value = root.inputs[0]
    producer = value.producer() if value is not None else None
    if is_op(producer, "Add") and producer is not None:
        value = next((v for v in producer.inputs if v is not None and not is_const(v)), None)
        producer = value.producer() if value is not None else None
    return is_op(producer, "ReduceSum", "ReduceMean")


def is_border(node: ir.Node) -> bool:
    """Whether the node only changes the float type of an input or of an output of the model: it stays outside of the integers."""
    if not is_op(node, "Cast") or not (is_float(node.inputs[0]) and is_float(node.outputs[0])):
        return False
    source, made = node.inputs[0], node.outputs[0]
    enters, leaves_it = source is not None and source.is_graph_input(), made.is_graph_output() and not made.uses()
    return enters != leaves_it and not (enters and made.is_graph_output())


def entrances(graph: ir.Graph) -> Iterator[ir.Value]:
    """The float tensors that numbers enter by: inputs, or what a border makes of them."""
    for value in graph.inputs:
        readers = [node for node, _ in value.uses()]
        casts = [node for node in readers if is_border(node)]
        yield from (node.outputs[0] for node in casts)
        if len(casts) < len(readers) or not readers:
            yield value


def exits(graph: ir.Graph) -> Iterator[ir.Value]:
    """The float tensors that numbers leave by: outputs, or what a border makes them from."""
    for value in graph.outputs:
        node = value.producer()
        yield node.inputs[0] if node is not None and is_border(node) and node.inputs[0] is not None else value


def _leaves_model(value: ir.Value) -> bool:
    return value.is_graph_output() or any(is_border(node) for node, _ in value.uses())


def is_float(value: ir.Value | None) -> bool:
    """Whether the tensor holds real numbers (unknown types count as float)."""
    return value is not None and (value.dtype is None or value.dtype in _FLOATS)


# ---- where codes are needed ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """A reader behind moves and single clamps: (node, slot), what it wants, and the factor of scalings on the way."""

    node: ir.Node | None
    slot: int
    want: Literal["int8", "wide", "raw", "scores"]
    factor: float = 1.0
    partial: bool = False


def entry(step: Step) -> tuple[ir.Node, int]:
    """The first node of the step that reads its source, and the slot."""
    return next((n, i) for n in step.nodes for i, v in enumerate(n.inputs) if v is step.source)


def settled(value: ir.Value) -> ir.Value:
    """Behind the clamps that alone read `value`: their limits become those of the codes."""
    while not value.is_graph_output():
        uses = data_uses(value)
        if len(uses) != 1 or not is_clamp(uses[0][0]):
            break
        value = uses[0][0].outputs[0]
    return value


def is_clamp(node: ir.Node) -> bool:
    """Relu, or Clip with constant bounds."""
    return is_op(node, "Relu") or (is_op(node, "Clip") and all(v is None or is_const(v) for v in node.inputs[1:]))


def leaves(found: Plan, value: ir.Value, factor: float = 1.0, partial: bool = False) -> Iterator[Leaf]:
    """Who reads the elements of `value` in the end."""
    if value.is_graph_output():
        yield Leaf(None, 0, "raw", factor, partial)
    for node, slot in data_uses(value):
        step = found.of.get(node)
        if step is None or step.family == "keep":  # inside a subgraph, whose node is refused
            continue
        if step.family == "border":
            yield Leaf(None, 0, "raw", factor, partial)
            continue
        if step.family == "move" and slot == 0:
            narrow = partial or node.op_type in _SELECTS
            for out in node.outputs:
                yield from leaves(found, out, factor, narrow)
        elif step.family == "scale" and (by := scalar_factor(node)) is not None and by > 0:
            yield from leaves(found, node.outputs[0], factor * by, partial)
        else:
            yield Leaf(node, slot, _want(step, node, slot), factor, partial)


def scalar_factor(node: ir.Node) -> float | None:
    """The one number that a Mul or Div multiplies by."""
    if is_op(node, "Div"):
        divisor = const_scalar(node.inputs[1])
        return 1.0 / divisor if divisor else None
    found = [f for v in node.inputs if (f := const_scalar(v)) is not None]
    return found[0] if is_op(node, "Mul") and found else None


def _want(step: Step, node: ir.Node, slot: int) -> Literal["int8", "wide", "raw", "scores"]:
    match step.family:
        case "linear" | "product" | "table" | "maxpool" | "avgpool":
            return "int8"
        case "norm":
            return "wide"
        case "softmax":
            return "scores"
        case _:
            return "raw"


def own_store(found: Plan, value: ir.Value) -> bool:
    """Whether the readers of `value` do not tell one format for it, so that it needs one of its own."""
    readers = list(leaves(found, value))
    if any(leaf.want == "raw" for leaf in readers):
        return True
    return len(readers) > 1 and (any(r.partial for r in readers) or any(r.want == "scores" for r in readers))


def must_store(found: Plan, step: Step, value: ir.Value) -> bool:
    """Whether `value` is rounded where it is made or moved, not at its readers."""
    if step.family in _ROUNDING and not (step.family == "offset" and is_bias(found, step.node)):
        return True
    if _leaves_model(value) and step.family in ("multiply", "sum"):
        return True
    return any(n in found.of and found.of[n].family in ("move", "concat", "where", "extreme") for n, _ in data_uses(value))


def is_bias(found: Plan, node: ir.Node) -> bool:
    """Whether a constant is added to accumulators, at their scale."""
    producer: ir.Node | None = node
    while producer is not None and (producer is node or found.of[producer].family == "scale"):
        value = next((v for v in producer.inputs if v is not None and not is_const(v)), None)
        producer = value.producer() if value is not None else None
    accumulates = producer is not None and found.of[producer].family in _EXACT
    return accumulates and all(leaf.want != "scores" for leaf in leaves(found, node.outputs[0]))


def counted(node: ir.Node) -> tuple[ir.Value, np.ndarray] | None:
    """(n, c) of Sin(n c) or Cos(n c) with n [..., 1] cast from integers and c a vector."""
    product = node.inputs[0].producer() if is_op(node, "Sin", "Cos") and node.inputs[0] is not None else None
    found = constant_operand(product) if product is not None and is_op(product, "Mul") else None
    if product is None or found is None or found[0].shape[-1:] != (found[0].size,):
        return None
    value = product.inputs[1 - found[1]]
    cast = value.producer() if value is not None else None
    shape = static_shape(value)
    if value is None or cast is None or not is_op(cast, "Cast") or is_float(cast.inputs[0]) or not shape or shape[-1] != 1:
        return None
    return value, found[0].reshape(-1)


def constant_operand(node: ir.Node) -> tuple[np.ndarray, int] | None:
    """The constant of a binary node and its slot."""
    for slot in (1, 0):
        array = const_array(input_at(node, slot))
        if array is not None:
            return array, slot
    return None
