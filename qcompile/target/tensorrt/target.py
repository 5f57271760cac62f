"""TensorRT and TensorRT for RTX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcompile.ir.optable import SCALED_AT_RUN_TIME
from qcompile.quant.qtype import FLOAT4E2M1, FLOAT8E4M3FN, INT4, INT8
from qcompile.target.platform import Engine
from qcompile.target.target import Request, Target

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcompile.decide.placement import Placement
    from qcompile.ir.model import Model
    from qcompile.quant.spec import Scheme
    from qcompile.structure.scores import Scores, Values
    from qcompile.target.attention import AttentionBlock
    from qcompile.target.findings import Rule
    from qcompile.target.view import GraphView

_CAPABILITIES = ((INT8.name, 75), (INT4.name, 80), ("bfloat16", 80), (FLOAT8E4M3FN.name, 89))  # and fp4: Blackwell
_LOW = (INT8, FLOAT8E4M3FN, FLOAT4E2M1)
_MXFP8 = (
    "TensorRT-RTX 1.7 dequantizes MXFP8 operands and multiplies in float: a smaller file, no faster engine;"
    " --scheme fp8 and nvfp4 are multiplied in 8 and 4 bit"
)


@dataclass(frozen=True)
class TensorRT(Target):
    """Strongly typed networks: Q/DQ alone decide the precision, the float rest is float16."""

    schemes: tuple[str, ...] = ("w8a8", "fp16", "bf16", "fp8", "w4a16", "nvfp4", "mxfp8", "w6a6", "w4a8", "w4a4")
    half_body: bool = True
    symmetric: bool = True
    max_opset: int = 25
    activations: tuple = _LOW
    weights: tuple = (*_LOW, INT4)
    one_quantizer: bool = True
    fuses_elementwise: bool = True
    joins_thirds: bool = True
    lacks: frozenset[str] = SCALED_AT_RUN_TIME

    def default(self, scheme: Scheme) -> str:
        """NVFP4 blocks gain from smoothing too."""
        return "smooth" if scheme.name == "nvfp4" else super().default(scheme)

    def placement(self, model: Model, request: Request) -> Placement:
        """Q/DQ on inputs only."""
        from qcompile.target.tensorrt.placement import place

        return place(model, request)

    def unfused(
        self,
        view: GraphView,
        block: AttentionBlock,
        smallest: Mapping[str, Sequence[int]],
        largest: Mapping[str, Sequence[int]],
    ) -> tuple[str, ...]:
        """The conditions of `fusion` that do not hold."""
        from qcompile.target.tensorrt.fusion import unfused

        return unfused(view, block, smallest, largest)

    def forms(self, scheme: Scheme) -> tuple[str, ...]:
        """Attention kernels come in a few head sizes."""
        return (*super().forms(scheme), "pad-heads")

    def padded_head(self, scheme: Scheme, scores: Scores[ir.Node], values: Values[ir.Node]) -> int | None:
        """The next size that has a kernel, where nothing else stands against it."""
        from qcompile.target.tensorrt.facts import padded_head

        return padded_head(self, scheme, scores, values)

    @property
    def rules(self) -> Sequence[Rule]:
        """The rows of the behaviour matrix."""
        from qcompile.target.tensorrt.rules import TRT_RULES

        return TRT_RULES


TARGETS = (
    TensorRT(
        "trt",
        "TensorRT 10.12+ and 11, strongly typed",
        capabilities=(*_CAPABILITIES, (FLOAT4E2M1.name, 100)),
        engine=Engine("tensorrt", "tensorrt", "TensorRT", served=True),
    ),
    TensorRT(
        "rtx",
        "TensorRT for RTX",
        capabilities=(*_CAPABILITIES, (FLOAT4E2M1.name, 120)),
        gpus=("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
        caveats=(("mxfp8", _MXFP8),),
        engine=Engine("tensorrt_rtx", "rtx", "proxy: TensorRT-RTX", rtx=True, named_gpus=True),
    ),
)
