"""Target: what everything else asks of a platform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcompile.target.platform import Platform

if TYPE_CHECKING:  # a command that only lists targets imports no graphs
    import onnx_ir as ir

    from qcompile.decide.placement import Placement
    from qcompile.ir.model import Model
    from qcompile.ir.select import Selection
    from qcompile.oracle.ranges import Proof
    from qcompile.quant.spec import Scheme
    from qcompile.structure.scores import Scores, Values
    from qcompile.target.attention import AttentionBlock
    from qcompile.target.findings import Rule
    from qcompile.target.trial import Trial
    from qcompile.target.view import GraphView


@dataclass(frozen=True)
class Choices:
    """The user's choices about placement, the options of `annotate`: see there.  A target ignores what it has no use for."""

    attention: str = "auto"
    probabilities: str = "auto"
    residual: str = "float"


@dataclass(frozen=True)
class Request:
    """What a placement is asked for."""

    target: Target
    scheme: Scheme
    selection: Selection
    choices: Choices

    @property
    def native(self) -> bool:
        """Whether the target computes in the scheme's types."""
        return self.target.native(self.scheme)


@dataclass(frozen=True)
class Target(Platform):
    """A platform, and how models are made for it and judged; a folder holds all that is particular to it (see `catalog`)."""

    def default(self, scheme: Scheme) -> str:
        """The pipeline that runs when no --passes is given."""
        integers = scheme.activation is not None and scheme.activation.family == "int"
        return "smooth{search},bias-correct" if integers else ""

    def forms(self, scheme: Scheme) -> tuple[str, ...]:
        """The form passes that a graph needs before anything is decided, beyond `canonicalize`; their order is the registry's.

        Scales need their opset, a half body its norms in one piece; packed qkv weights are split; padding and batch norms are
        part of the layer that is quantized.
        """
        quantized = ("fold-pad", "fold-bn") if scheme.weight is not None else ()
        products = ("split-qkv", "bias-rank") if scheme.activation is not None else ()
        half = ("fuse-norm",) if self.body(scheme) != "float32" else ()
        return (*quantized, "opset", *half, *products)

    def whole_attention(self, scheme: Scheme) -> bool:
        """Whether ONNX Runtime's own attention operators stay in one piece: nothing inside them is quantized."""
        return False

    def lowering(self, scheme: Scheme) -> tuple[str, ...]:
        """The passes that bring in the target's arithmetic, in order."""
        half = {"float16": ("fp16",), "bfloat16": ("bf16",)}.get(self.body(scheme), ())
        return (("insert-qdq",) if scheme.weight is not None else ()) + half

    def place(self, model: Model, scheme: Scheme, selection: Selection, choices: Choices) -> Placement:
        """Which tensors are quantized, and which layers are not, with the reason."""
        from qcompile.decide.placement import Placement
        from qcompile.target.unplaced import miss_unplaced

        if scheme.weight is None:
            return Placement()
        placed = self.placement(model, Request(self, scheme, selection, choices))
        miss_unplaced(placed, model.graph, self)
        return placed

    def placement(self, model: Model, request: Request) -> Placement:
        """`place` for a scheme that quantizes something: what a target overrides."""
        raise NotImplementedError(f"target {self.name!r} has no placement")

    @property
    def rules(self) -> Sequence[Rule]:
        """The rules of `qcompile check`."""
        return ()

    def tries(self, trial: Trial) -> None:
        """Try what was written for this target in its own setting."""
        trial.loads()
        trial.keeps_rules()
        if self.engine is not None:
            trial.parses()

    def unfused(
        self,
        view: GraphView,
        block: AttentionBlock,
        smallest: Mapping[str, Sequence[int]],
        largest: Mapping[str, Sequence[int]],
    ) -> tuple[str, ...]:
        """Why an attention block became several kernels, as far as it is known; shapes of tensors at both ends of a profile."""
        return ()

    def padded_head(self, scheme: Scheme, scores: Scores[ir.Node], values: Values[ir.Node]) -> int | None:
        """The head size with which an attention is one kernel, where it is none with its own; None if there is no such size."""
        return None

    def proof(self, view: GraphView) -> Proof | None:
        """Proven bounds of every integer in a model that computes with nothing else; None where there is nothing to prove."""
        return None
