"""OpenVINO on CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcompile.quant.qtype import INT8, UINT8
from qcompile.target.target import Request, Target

if TYPE_CHECKING:
    from qcompile.decide.placement import Placement
    from qcompile.ir.model import Model
    from qcompile.target.findings import Rule
    from qcompile.target.trial import Trial


@dataclass(frozen=True)
class OpenVino(Target):
    """Q/DQ pairs that its CPU plugin turns into 8-bit kernels (it reads them as FakeQuantize)."""

    def placement(self, model: Model, request: Request) -> Placement:
        """Everything that stands between two layers is quantized through."""
        from qcompile.target.openvino.placement import place

        return place(model, request)

    @property
    def rules(self) -> Sequence[Rule]:
        """What makes the plugin compute in float."""
        from qcompile.target.openvino.rules import OPENVINO_RULES

        return OPENVINO_RULES

    def tries(self, trial: Trial) -> None:
        """The CPU plugin."""
        super().tries(trial)
        trial.runs_in_openvino()


TARGETS = (
    OpenVino(
        "openvino",
        "OpenVINO, CPU",
        ("w8a8",),
        activations=(UINT8, INT8),
        weights=(INT8,),
        fuses_elementwise=True,
    ),
)
