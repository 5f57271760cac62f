"""The builder's verbose kernel dump as data.

The dump is a log message, not an interface: its form was read from the versions in `TESTED`, one line a layer:

    Name: .., LayerType: gemm, Inputs: [ { Name: .., Dimensions: [1,64,128], .., Datatype: Int8, .. }], Constants: [..],
    Outputs: [..], TacticName: .., StreamId: 0, Metadata: [ONNX Layer: a]<US>[ONNX Layer: b]

Layers that hold no kernel (copies of shapes, jumps of loops and branches) lack `Constants` and have other words in front of
`Metadata`.  A line of another form costs itself: it is counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

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
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs> *|.*?\})\], "
    r"(?:Constants: \[(?P<constants> *|.*?\})\], )?Outputs: \[(?P<outputs> *|.*?\})\](?:, .*?Metadata: ?(?P<metadata>.*)|.*)",
    re.DOTALL,
)
_TENSOR = re.compile(r"\{ Name: .*?, Dimensions: \[(?P<dims>[-\d,]*)\], .*?Datatype: (?P<dtype>\w+)")
_SEPARATOR = re.compile("[\x1e\x1f]")
_ONNX_NAME = re.compile(r"\[ONNX Layer: (.*)\]", re.DOTALL)


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


@dataclass(frozen=True)
class Dump:
    """The layers of an engine, in execution order, and how many lines have another form than the known one."""

    kernels: tuple[Kernel, ...]
    unread: int

    @property
    def blind(self) -> bool:
        """Whether the form is so different that nothing is known of any node."""
        return self.unread > 0 and not any(k.nodes for k in self.kernels)


def parse_dump(text: str, names: Mapping[str, str] | None = None) -> Dump:
    """What a `Layers:` message says; `names`: ONNX nodes that were renamed for the builder, and what they are called."""
    lines = re.split(r"\n(?=Name: )", text.split("\n\nI/O Tensors:")[0])[1:]
    kernels = [_kernel(line.strip("\n"), names or {}) for line in lines]
    known = tuple(k for k in kernels if k is not None)
    return Dump(known, len(kernels) - len(known))


def _kernel(line: str, names: Mapping[str, str]) -> Kernel | None:
    """None where the line has another form, or says in another way which nodes it covers."""
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    nodes = _names(match["metadata"] or "")
    if not nodes and (match["metadata"] or "").strip():
        return None
    inputs, constants, outputs = (_operands(match[side] or "") for side in ("inputs", "constants", "outputs"))
    return Kernel(match["name"], match["type"], inputs, constants, outputs, tuple(names.get(n, n) for n in nodes))


def _operands(text: str) -> tuple[Operand, ...]:
    found = _TENSOR.finditer(text)
    return tuple(Operand(tuple(int(d) for d in m["dims"].split(",") if d), m["dtype"]) for m in found)


def _names(metadata: str) -> tuple[str, ...]:
    tags = (_ONNX_NAME.fullmatch(tag.strip()) for tag in _SEPARATOR.split(metadata))
    return tuple(dict.fromkeys(m[1] for m in tags if m is not None))


def covering(kernels: Sequence[Kernel]) -> dict[str, list[Kernel]]:
    """ONNX node name -> the compute kernels that cover it."""
    found: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        for node in kernel.nodes if kernel.compute else ():
            found.setdefault(node, []).append(kernel)
    return found
