"""Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcompile.quant.qtype import INT8
from qcompile.target.target import Request, Target

if TYPE_CHECKING:
    from qcompile.decide.placement import Placement
    from qcompile.ir.model import Model
    from qcompile.oracle.ranges import Proof
    from qcompile.quant.spec import Scheme
    from qcompile.target.findings import Rule
    from qcompile.target.trial import Trial
    from qcompile.target.view import GraphView


@dataclass(frozen=True)
class Integer(Target):
    """Standard ONNX operators on integers, from the first QuantizeLinear to the last DequantizeLinear."""

    def forms(self, scheme: Scheme) -> tuple[str, ...]:
        """Shapes are arithmetic too: what is known of them is folded."""
        return (*super().forms(scheme), "fold-dims")

    def lowering(self, scheme: Scheme) -> tuple[str, ...]:
        """No Q/DQ around float operators."""
        return ("integer",)

    def placement(self, model: Model, request: Request) -> Placement:
        """A format for every tensor."""
        from qcompile.target.integer.placement import place

        return place(model, request)

    @property
    def rules(self) -> Sequence[Rule]:
        """Purity, and the overflow proof."""
        from qcompile.target.integer.rules import INTEGER_RULES

        return INTEGER_RULES

    def proof(self, view: GraphView) -> Proof | None:
        """Bounds of every integer, from the graph alone."""
        from qcompile.target.integer.rules import proof_of

        return proof_of(view)

    def tries(self, trial: Trial) -> None:
        """The oracle beside ONNX Runtime."""
        super().tries(trial)
        trial.computes_exactly()


TARGETS = (
    Integer(
        "integer",
        "integers only: standard ONNX operators, no floating point between the first Q and the last DQ",
        ("w8a8", "w6a6", "w4a8", "w4a4"),
        min_opset=21,
        activations=(INT8,),
        weights=(INT8,),
        mixed_widths=True,
    ),
)
