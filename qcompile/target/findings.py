"""Finding and Rule: what the rule checker reports, and how a rule is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from qcompile.target.platform import Platform
from qcompile.target.view import DEQUANTIZE_OPS, QUANTIZE_OPS, WEIGHTED_OPS, GraphView, attribute

Severity = Literal["error", "warning"]
Effect = Literal["refused", "float", "wrong", "notice"]
Hits = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Finding:
    """One broken rule at one node (`node` is "" for the model): what is wrong and what to do."""

    rule: str
    severity: Severity
    node: str
    message: str
    fix: str

    def to_json(self) -> dict[str, Any]:
        """The keys rule, severity, node, message, fix."""
        return dict(vars(self))


@dataclass(frozen=True)
class Operand:
    """A quantized input of a weighted operator: the slot, its DequantizeLinear, the code type, and where it comes from.

    `axis_here` is the per-channel or blocked axis seen by the operator (None: per tensor, or not traceable);
    `block` is the block size, 0 without blocks; `one_scale`: the scale is a list of one number instead of a number.
    """

    slot: int
    dq: NodeProto
    type_name: str | None
    constant: bool
    per_axis: bool
    axis_here: int | None
    rank: int | None
    block: int = 0
    one_scale: bool = False


@dataclass(frozen=True)
class Site:
    """A weighted operator and its quantized operands."""

    node: NodeProto
    operands: tuple[Operand, ...]
    constant_weight: bool

    @property
    def activations(self) -> tuple[Operand, ...]:
        """Quantized operands that are not constant."""
        return tuple(o for o in self.operands if not o.constant)

    @property
    def weight(self) -> Operand | None:
        """The quantized constant operand, if there is one."""
        return next((o for o in self.operands if o.constant), None)

    def transposed(self, slot: int) -> bool:
        """Whether a Gemm turns the operand in `slot` around."""
        return bool(attribute(self.node, ("transA", "transB")[slot], 0))

    def reduction_axis(self, operand: Operand) -> int | None:
        """The axis of a MatMul or Gemm operand that is summed over; None for other operators or an unknown rank."""
        if self.node.op_type not in ("MatMul", "Gemm") or operand.rank is None:
            return None
        last = (operand.slot == 0) != self.transposed(operand.slot)
        return max(operand.rank - (1 if last else 2), 0)


@dataclass
class Context:
    """What rules look at."""

    view: GraphView
    target: Platform
    gpus: Sequence[str]

    @cached_property
    def quantizers(self) -> list[NodeProto]:
        """All Q and DQ nodes."""
        return list(self.view.of_type(*QUANTIZE_OPS, *DEQUANTIZE_OPS))

    @cached_property
    def sites(self) -> list[Site]:
        """Weighted operators with at least one quantized operand."""
        sites = (site(self.view, n) for n in self.view.of_type(*WEIGHTED_OPS))
        return [s for s in sites if s.operands]

    def code_type(self, node: NodeProto) -> str | None:
        """The code type of a Q or DQ node."""
        if node.op_type in DEQUANTIZE_OPS:
            return self.view.low_type(node)
        return self.view.output_type(node)


Check = Callable[[Context], Hits]
Repair = Callable[[Context], None]


@dataclass(frozen=True)
class Rule:
    """A stable id, a short title, how bad it is, what to do, and the check that yields (node, message).

    `effect`: the engine is "refused"; it builds but the node runs in "float"; it computes something else, where it
    builds ("wrong"); or a "notice" about speed, accuracy or other versions.  `repair`, where the fix is mechanical,
    changes the context's model in place.  `before_build`: no engine is tried, which would take minutes to say so.
    """

    id: str
    title: str
    severity: Severity
    fix: str
    check: Check
    effect: Effect = "notice"
    repair: Repair | None = None
    before_build: bool = False

    @property
    def summary(self) -> str:
        """The check's first line of documentation."""
        return (self.check.__doc__ or self.title).partition("\n")[0].strip()

    def findings(self, context: Context) -> list[Finding]:
        """The rule's findings on one model."""
        return [Finding(self.id, self.severity, node, message, self.fix) for node, message in self.check(context)]


def error(
    rule: str,
    check: Check,
    title: str,
    fix: str,
    effect: Effect = "notice",
    repair: Repair | None = None,
    *,
    before_build: bool = False,
) -> Rule:
    """A rule whose findings are errors."""
    return Rule(rule, title, "error", fix, check, effect, repair, before_build)


def warning(rule: str, check: Check, title: str, fix: str, effect: Effect = "notice", repair: Repair | None = None) -> Rule:
    """A rule whose findings are warnings."""
    return Rule(rule, title, "warning", fix, check, effect, repair)


def site(view: GraphView, node: NodeProto) -> Site:
    """The quantized operands of a weighted operator."""
    operands = (_operand(view, node, slot) for slot in (0, 1) if slot < len(node.input))
    constant = any(view.is_constant(x) for x in node.input[:2])
    return Site(node, tuple(o for o in operands if o is not None), constant)


def _operand(view: GraphView, node: NodeProto, slot: int) -> Operand | None:
    dq = view.dequantizer(node.input[slot])
    if dq is None:
        return None
    block = int(attribute(dq, "block_size", 0))
    vector = view.ranks.get(dq.input[1], 0) == 1 and not block
    per_axis = vector and _length(view, dq.input[1]) > 1
    rank = view.ranks.get(dq.input[0])
    axis = view.axis_after(node.input[slot], _axis(dq, rank)) if per_axis or block else None
    one = vector and not per_axis
    return Operand(slot, dq, view.low_type(dq), view.is_constant(dq.input[0]), per_axis, axis, rank, block, one)


def _length(view: GraphView, name: str) -> int:
    proto = view.constant_proto(name)
    return 2 if proto is None else int(np.prod(proto.dims))


def _axis(dq: NodeProto, rank: int | None) -> int:
    axis = int(attribute(dq, "axis", 1))
    return axis + rank if axis < 0 and rank is not None else axis


def scale_of(view: GraphView, node: NodeProto) -> NDArray[np.generic] | None:
    """The constant scale of a Q or DQ node, None when it is computed."""
    return view.constant(node.input[1])
