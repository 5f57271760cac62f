"""What placements answer: the sites that annotate turns into decisions, and the refusals."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from qcompile.decide.decisions import value_at
from qcompile.ir.ops import output_channel_axis
from qcompile.pipeline.base import PassContext
from qcompile.quant.qtype import UINT8, QType, simulated_int
from qcompile.quant.spec import Granularity, PerAxis, PerBlock, QuantSpec, Scheme


@dataclass(frozen=True)
class Site:
    """One input (slot >= 0) or output (~i) to quantize; its range is that of the tensor `like` if given.

    `carried`: measured per channel and by sampled rows, which follow the folds of earlier passes.
    `bounds`: a range that is known without measuring.  `follows`: takes over the decision of another use of the tensor.
    """

    node: ir.Node
    slot: int
    spec: QuantSpec
    like: ir.Value | None = None
    carried: bool = False
    bounds: tuple[float, float] | None = None
    follows: Site | None = None

    @property
    def measured(self) -> str:
        """Name of the tensor whose statistics set the range."""
        return str((self.like or self.value).name)

    @property
    def value(self) -> ir.Value:
        """The tensor to quantize."""
        return value_at(self.node, self.slot)

    @property
    def is_weight(self) -> bool:
        """Whether the tensor is a constant."""
        return self.value.const_value is not None


@dataclass
class Placement:
    """Sites to quantize, (node, reason) for compute that stays in float, and (node, remark) for what differs from the scheme."""

    sites: list[Site] = field(default_factory=list[Site])
    missed: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    notes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def add(self, node: ir.Node, slot: int, spec: QuantSpec, like: ir.Value | None = None, *, carried: bool = False) -> None:
        """Quantize `slot` of `node`, once."""
        if all(s.node is not node or s.slot != slot for s in self.sites[-64:]):
            self.sites.append(Site(node, slot, spec, like, carried))

    def known(self, node: ir.Node, slot: int, spec: QuantSpec, bounds: tuple[float, float]) -> None:
        """Quantize `slot` of `node` over a range that is known."""
        self.sites.append(Site(node, slot, spec, bounds=bounds))

    def follow(self, node: ir.Node, slot: int, leader: Site) -> None:
        """Let `slot` of `node` read what `leader` reads."""
        self.sites.append(Site(node, slot, leader.spec, follows=leader))

    def miss(self, node: ir.Node, reason: str) -> None:
        """Leave `node` in float."""
        self.missed.append((str(node.name), reason))

    def note(self, node: ir.Node, reason: str) -> None:
        """Quantize `node` otherwise than the scheme says."""
        self.notes.append((str(node.name), reason))


def weight_spec(node: ir.Node, slot: int, scheme: Scheme) -> QuantSpec:
    """Symmetric, per output channel; blocks along the reduction axis where the scheme says so."""
    assert scheme.weight is not None
    axis = output_channel_axis(node)
    granularity: Granularity = PerAxis(axis)
    if scheme.block_size is not None and node.op_type in ("MatMul", "Gemm"):
        granularity = PerBlock(1 - axis, scheme.block_size)
    return QuantSpec(scheme.weight, granularity, symmetric=True, method="mse" if scheme.weight.bits < 8 else "minmax")


def activation_spec(ctx: PassContext) -> QuantSpec:
    """Per tensor: signed and symmetric where zero points must be 0, else unsigned with a zero point."""
    qtype = ctx.scheme.fallback or ctx.scheme.activation
    assert qtype is not None
    if ctx.target.symmetric or qtype.family == "float":
        return QuantSpec(qtype)
    return QuantSpec(unsigned(qtype), symmetric=False)


def unsigned(qtype: QType) -> QType:
    """The unsigned integer of the same width."""
    return UINT8 if qtype.bits == 8 else simulated_int(qtype.bits, signed=False)
