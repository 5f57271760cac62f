"""Platform: what a piece of hardware and its software accept, as data."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.errors import UsageError
from qcompile.quant.qtype import QType
from qcompile.quant.spec import Scheme

_OPSET = {"INT8": 19, "UINT8": 13, "FLOAT8E4M3FN": 19, "INT4": 21, "UINT4": 21, "FLOAT4E2M1": 23}
_BODY_OPSET = {"float32": 1, "float16": 17, "bfloat16": 22}  # LayerNormalization; Conv and pooling in bfloat16
_BLOCK_OPSET = 21
_FLOAT32_SCALE_OPSET = {"INT8": 13, "UINT8": 13}


@dataclass(frozen=True)
class OpRule:
    """How one operator may be quantized.

    `weight_axis` is the per-channel axis of the weight: an index, "last", or "trans_b" (Gemm: 0 if transB else 1);
    `low_kernel` is False where the target builds a float kernel whatever the Q/DQ says.
    """

    op_type: str
    weight_axis: int | str
    low_kernel: bool = True

    def axis(self, rank: int, trans_b: bool = False) -> int:
        """The non-negative per-channel axis of a weight of `rank` axes."""
        if self.weight_axis == "trans_b":
            return 0 if trans_b else 1
        return rank - 1 if self.weight_axis == "last" else int(self.weight_axis)


@dataclass(frozen=True)
class Engine:
    """How engines are built: the Python module that builds them and the extra of qcompile that installs it.

    `label` is what an audit of its kernels is called; `rtx`: the library's RTX flavour, with options and a file format of its
    own; `named_gpus`: it builds on any machine for the GPUs that are named, and not for this machine's own; `served`: Triton's
    tensorrt backend loads its plans.
    """

    module: str
    extra: str
    label: str
    rtx: bool = False
    named_gpus: bool = False
    served: bool = False


@dataclass(frozen=True)
class Platform:
    """What a target accepts.

    `schemes` it can run; `half_body`: the float rest and the scales are float16; `symmetric`: zero points must be 0;
    `activations` and `weights` are the code types it computes with; `ops` says how each operator is quantized;
    `capabilities` maps a code type to the lowest compute capability (89 = sm89); `gpus` lists the targets that can be
    compiled for (empty: any); `max_opset` is the newest that loads;
    `caveats` maps a scheme to what its user must know; `engine`: who builds engines for it.
    `one_quantizer`: two unequal quantizers of one tensor cannot run; `mixed_widths`: layers may differ in width (--bits);
    `tables`: companded codes can be simulated; `fuses_elementwise`: one more Mul behind an activation costs no time;
    `lacks`: operators that it has in no form;
    `dynamic_lstm`: it has an LSTM in 8 bit that is quantized at run time;
    `joins_thirds`: a packed q/k/v projection that cannot be taken apart is computed in three parts and joined again.
    """

    name: str
    title: str
    schemes: tuple[str, ...]
    half_body: bool = False
    symmetric: bool = False
    min_opset: int = 13
    max_opset: int = 26
    activations: tuple[QType, ...] = ()
    weights: tuple[QType, ...] = ()
    ops: tuple[OpRule, ...] = (
        OpRule("Conv", 0),
        OpRule("ConvTranspose", 1, low_kernel=False),
        OpRule("MatMul", "last"),
        OpRule("Gemm", "trans_b"),
    )
    capabilities: tuple[tuple[str, int], ...] = ()
    gpus: tuple[str, ...] = ()
    caveats: tuple[tuple[str, str], ...] = ()
    engine: Engine | None = None
    one_quantizer: bool = False
    mixed_widths: bool = False
    tables: bool = False
    fuses_elementwise: bool = False
    joins_thirds: bool = False
    dynamic_lstm: bool = False
    lacks: frozenset[str] = frozenset()

    def require(self, scheme: Scheme) -> None:
        """Raises UsageError: the target cannot run the scheme."""
        if scheme.name not in self.schemes:
            raise UsageError(f"target {self.name!r} has no scheme {scheme.name!r} (it has: {', '.join(self.schemes)})")

    def native(self, scheme: Scheme) -> bool:
        """Whether kernels compute in the scheme's types; else its numbers are right and no speed is gained."""
        return not scheme.simulated

    def expresses(self, qtype: QType) -> bool:
        """Whether codes of this type can be written for the target; companded ones as a table, or where a small float holds
        each of their levels."""
        if qtype.companded and qtype.storage == "INT32":
            return self.tables
        return any(t.storage == qtype.storage for t in (*self.activations, *self.weights))

    def body(self, scheme: Scheme) -> str:
        """The type of what is not quantized: float16, bfloat16 or float32."""
        return "float16" if self.half_body and scheme.body == "float32" else scheme.body

    def opset(self, scheme: Scheme) -> int:
        """The lowest opset that the scheme needs here: 19 where scales are float16, 21 for int4 and blocks, 23 for fp4, and what
        the type of the float rest needs."""
        types: list[QType] = [t for t in (scheme.weight, scheme.activation) if t is not None]
        blocks = _BLOCK_OPSET if scheme.block_size is not None else 0
        return max([self.min_opset, blocks, _BODY_OPSET[self.body(scheme)], *(self.type_opset(t.storage) for t in types)])

    def type_opset(self, storage: str) -> int:
        """The lowest opset in which codes of the ONNX type `storage` can be (de)quantized with this target's scales."""
        if not self.half_body and storage in _FLOAT32_SCALE_OPSET:
            return _FLOAT32_SCALE_OPSET[storage]
        return _OPSET.get(storage, 21)

    def op_rule(self, op_type: str) -> OpRule | None:
        """The rule of a weighted operator, None for any other."""
        return next((r for r in self.ops if r.op_type == op_type), None)

    def capability(self, type_name: str) -> int:
        """The lowest compute capability (80 = sm80) with kernels for codes of `type_name`; 0 if any will do."""
        return dict(self.capabilities).get(type_name, 0)
