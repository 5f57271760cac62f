"""ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcompile.quant.qtype import INT4, INT8, UINT8
from qcompile.target.target import Request, Target

if TYPE_CHECKING:
    from qcompile.decide.placement import Placement
    from qcompile.ir.model import Model
    from qcompile.quant.spec import Scheme
    from qcompile.target.findings import Rule
    from qcompile.target.trial import Trial


@dataclass(frozen=True)
class OnnxRuntime(Target):
    """Q/DQ where the CPU provider has an integer kernel; every layer where widths are only simulated."""

    def native(self, scheme: Scheme) -> bool:
        """8 bit on both sides, or no quantization; int4 weights alone stand where a study would put them."""
        return not scheme.simulated and (scheme.activation is not None or scheme.weight is None)

    def forms(self, scheme: Scheme) -> tuple[str, ...]:
        """Stems and GELUs as the CPU kernels want them."""
        return super().forms(scheme) + (
            ("space-to-depth", "gelu-order") if self.native(scheme) and scheme.weight is not None else ()
        )

    def whole_attention(self, scheme: Scheme) -> bool:
        """Its kernels are faster than their parts, and products of attention stay in float; studies of widths go inside."""
        return scheme.activation is None or self.native(scheme)

    def placement(self, model: Model, request: Request) -> Placement:
        """As the kernels fuse; a study of widths quantizes what an accelerator would."""
        from qcompile.target.ort.placement import place
        from qcompile.target.tensorrt.placement import place as place_all

        return (place if request.native else place_all)(model, request)

    @property
    def rules(self) -> Sequence[Rule]:
        """Those of the CPU provider."""
        from qcompile.target.ort.rules import ORT_RULES

        return ORT_RULES

    def tries(self, trial: Trial) -> None:
        """A session as deployed."""
        trial.keeps_rules()
        trial.runs()


TARGETS = (
    OnnxRuntime(
        "ort",
        "ONNX Runtime, CPU and CUDA providers",
        ("w8a8", "fp16", "w6a6", "w4a8", "w4a4", "w4a16"),
        activations=(UINT8, INT8),
        weights=(INT8, UINT8, INT4),
        tables=True,
        dynamic_lstm=True,
    ),
)
