"""The builder's verbose kernel dump as data.

The dump is a log message, not an interface: its form was read from the versions in `TESTED`, one line a kernel:

    Name: .., LayerType: gemm, Inputs: [ { Name: .., Dimensions: [1,64,128], .., Datatype: Int8, .. }], Constants: [..],
    Outputs: [..], TacticName: .., StreamId: 0, Metadata: [ONNX Layer: a]<US>[ONNX Layer: b]
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from qcompile.errors import BackendError

TESTED = ("1.7.1.116",)
DEQUANTIZING = "runtime_fusion"  # may read codes, but multiplies in float after dequantizing inside the kernel
COMPUTE_KERNELS = frozenset({"gemm", "correlation", "deconv", DEQUANTIZING})
_FP4 = "FP4E2M1"
LOW_DATATYPES = {
    "Int8": "int8",
    "FP8": "float8e4m3fn",
    "Float8": "float8e4m3fn",
    "FP4": "float4e2m1",
    _FP4: "float4e2m1",
    "Int4": "int4",
}

_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), StreamId: -?\d+,(?: EventId: \d+,)? "
    r"Metadata: ?(?P<metadata>.*)$"
)
_TENSOR = re.compile(r"\{ Name: .*?, Dimensions: \[(?P<dims>[-\d,]*)\], .*?Datatype: (?P<dtype>\w+)")
_SEPARATOR = re.compile("[\x1e\x1f]")
_ONNX_NAME = re.compile(r"\[ONNX Layer: (.*)\]$")


@dataclass(frozen=True)
class Operand:
    """A tensor that a kernel reads or writes; dims have -1 for axes that vary at run time."""

    dims: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Kernel:
    """One kernel of the engine and the names of the ONNX nodes it covers."""

    name: str
    type: str
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    nodes: tuple[str, ...]

    @property
    def attention(self) -> bool:
        """Whether this is a fused attention kernel."""
        return "_mha" in self.name

    @property
    def compute(self) -> bool:
        """Whether it multiplies matrices (the dequantizing epilogues repeat the names and do not count)."""
        return self.attention or self.type in COMPUTE_KERNELS

    def reads(self) -> str | None:
        """The low type that both compute operands (q, k and v of an attention kernel) are read in; None if any is float."""
        if self.attention:
            low = [LOW_DATATYPES[x.dtype] for x in self.inputs if x.dtype in LOW_DATATYPES]
            return low[0] if len(low) >= 3 and len(set(low)) == 1 else None
        weight = self.weight()
        if self.type == DEQUANTIZING or not self.inputs or weight is None or self.inputs[0].dtype != weight.dtype:
            return None
        return LOW_DATATYPES.get(weight.dtype)

    def weight(self) -> Operand | None:
        """The second compute operand: the largest constant, else (activations on both sides) the second input.

        FP4 weights with an odd length are padded in front of the kernel, whose constants are then the scales alone.
        """
        if len(self.inputs) > 1 and self.inputs[1].dtype == _FP4:
            return self.inputs[1]
        largest = max(self.constants, key=lambda c: prod(c.dims), default=None)
        if largest is not None and prod(largest.dims) > 1 and len(largest.dims) > 1:
            return largest
        return self.inputs[1] if len(self.inputs) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Plain dict: name, type, dtypes of inputs, constants and outputs, nodes."""
        sides = {"inputs": self.inputs, "constants": self.constants, "outputs": self.outputs}
        dtypes = {side: [x.dtype for x in operands] for side, operands in sides.items()}
        return {"name": self.name, "type": self.type, **dtypes, "nodes": list(self.nodes)}


def parse_dump(text: str, version: str) -> list[Kernel]:
    """The kernels of a `Layers:` message, in execution order.

    Raises:
        BackendError: the text does not have the known form.
    """
    lines = [line for line in text.split("\nI/O Tensors:")[0].split("\n") if line.startswith("Name: ")]
    matches = [_LINE.match(line) for line in lines]
    kernels = [_kernel(m) for m in matches if m is not None]
    if not kernels or len(kernels) < len(lines) or not any(k.nodes for k in kernels):
        raise BackendError(
            f"the kernel dump of TensorRT-RTX {version} has an unknown form ({len(kernels)} of {len(lines)} lines read); "
            f"the audit was tested with {', '.join(TESTED)}: install tensorrt-rtx=={TESTED[-1]}"
        )
    return kernels


def _kernel(match: re.Match[str]) -> Kernel:
    inputs, constants, outputs = (_operands(match[side]) for side in ("inputs", "constants", "outputs"))
    return Kernel(match["name"], match["type"], inputs, constants, outputs, _names(match["metadata"]))


def _operands(text: str) -> tuple[Operand, ...]:
    found = _TENSOR.finditer(text)
    return tuple(Operand(tuple(int(d) for d in m["dims"].split(",") if d), m["dtype"]) for m in found)


def _names(metadata: str) -> tuple[str, ...]:
    tags = (_ONNX_NAME.match(tag) for tag in _SEPARATOR.split(metadata))
    return tuple(dict.fromkeys(m[1] for m in tags if m is not None))


def covering(kernels: Sequence[Kernel]) -> dict[str, list[Kernel]]:
    """ONNX node name -> the compute kernels that cover it."""
    found: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        for node in kernel.nodes if kernel.compute else ():
            found.setdefault(node, []).append(kernel)
    return found
