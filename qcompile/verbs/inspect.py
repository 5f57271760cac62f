"""`qcompile inspect`: what is in a model, or known of an engine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnx
import onnx_ir as ir

from qcompile import structure as match
from qcompile.backend.audit import audit
from qcompile.backend.engine_card import EngineCard, engine_card, engine_of
from qcompile.backend.precision import AuditFigures, ComputeNode, compute_nodes
from qcompile.errors import UsageError
from qcompile.ir import ops
from qcompile.ir.model import Model
from qcompile.ir.optable import ops_with
from qcompile.ir.reader import file_bytes, read_proto
from qcompile.oracle.cost import Cost
from qcompile.oracle.ranges import prove
from qcompile.report import SCHEMA_VERSION
from qcompile.verbs.options import Written

PREFIX = "qcompile."
_JSON_KEYS = {"calibration", "facts", "shapes"}
_TRANSPARENT = ops_with("reshapes") - {"Flatten"} | {"Cast", "Transpose"}
_STRUCTURES = {
    "norms": match.find_norms,
    "attentions": match.find_attentions,
    "mlps": match.find_mlps,
    "linears": match.find_linears,
    "residual_streams": match.find_residual_streams,
    "conv_chains": match.find_conv_chains,
}


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """What is set beside the plan."""

    audit: Annotated[Path | None, "What audit --json printed: plan beside kernels.", Written("RESULT.json")] = None
    gpu: Annotated[str | None, "Audit MODEL now for this GPU, e.g. sm89; none is needed here.", Written("SM")] = None
    remarks: Annotated[Path | None, "What compile --remarks wrote: why float.", Written("OUT.json")] = None


@dataclass(frozen=True)
class TensorInfo:
    """An input or an output; an axis is its length, its name, or None."""

    name: str | None
    dtype: str | None
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized tensor: "per-tensor", "per-axis N" or "per-block N"; no scales or zero points when computed or absent."""

    tensor: str | None
    role: Literal["activation", "weight"]
    dtype: str | None
    granularity: str
    scale_min: float | None
    scale_max: float | None
    zero_point_min: float | None
    zero_point_max: float | None


@dataclass(frozen=True)
class WeightShare:
    """Elements of the weights of all matrix products and convolutions, and how many of them are stored quantized."""

    elements: int
    quantized: int

    @property
    def share(self) -> float | None:
        """Quantized / all; None when there are none."""
        return self.quantized / self.elements if self.elements else None

    def to_json(self) -> dict[str, Any]:
        """`elements, quantized, share`."""
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True)
class Found:
    """How many structures of a kind there are, and how many candidates are none, by reason."""

    found: int
    refused: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What is in a model.

    `nodes`: count by operator.  `parameters`: elements of the weights.  `metadata`: what qcompile wrote.  `integer`: what an
    integer-only model costs a sample.  `structures`: None for a quantized model, whose weights are behind
    DequantizeLinear, where the finders do not look.
    """

    path: Path
    size_mb: float
    ir_version: int
    opset: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    nodes: Mapping[str, int]
    parameters: int
    metadata: Mapping[str, Any]
    quantized: tuple[QuantizedTensor, ...]
    weights: WeightShare
    compute: tuple[ComputeNode, ...]
    integer: Cost | None
    audit: AuditFigures | None
    structures: Mapping[str, Found] | None

    def to_json(self) -> dict[str, Any]:
        """`schema_version`, `kind` ("onnx") and the fields."""
        return {
            "schema_version": SCHEMA_VERSION, "kind": "onnx", **vars(self), "path": str(self.path),
            "inputs": [asdict(v) for v in self.inputs], "outputs": [asdict(v) for v in self.outputs],
            "quantized": [asdict(t) for t in self.quantized], "weights": self.weights.to_json(),
            "compute": [n.to_json() for n in self.compute],
            "integer": None if self.integer is None else self.integer.to_json(),
            "audit": None if self.audit is None else self.audit.to_json(),
            "structures": None if self.structures is None else {name: asdict(f) for name, f in self.structures.items()},
        }  # fmt: skip


def inspect(path: str | Path, options: InspectOptions | None = None) -> Inspected | EngineCard:
    """Describe the ONNX model, engine or engine manifest at `path`; nothing is run.

    Raises:
        ModelError: the file cannot be used; an engine has no manifest.
        UsageError: two audits, or one of another model; or options of models for an engine.
        BackendError: the audit cannot be made.
    """
    path, options = Path(path), options or InspectOptions()
    engine = engine_of(path)
    if engine is not None:
        if options != InspectOptions():
            raise UsageError("--audit, --gpu and --remarks belong to an ONNX model; an engine's audit is in its manifest")
        return engine_card(engine)
    remarks = [] if options.remarks is None else _document(options.remarks, "remarks", "qcompile compile --remarks")["remarks"]
    return inspect_model(path, _audit(path, options.audit, options.gpu), remarks)


def _audit(path: Path, file: Path | None, gpu: str | None) -> dict[str, Any] | None:
    if file is not None and gpu is not None:
        raise UsageError("--audit reads an audit and --gpu makes one; give one of them")
    if file is not None:
        return _document(file, "kernels", "qcompile audit --json")
    return None if gpu is None else audit(path, gpu).to_json()


def _document(file: Path, key: str, maker: str) -> dict[str, Any]:
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UsageError(f"cannot read {file} ({e}); make it with: {maker}") from e
    if not isinstance(found, dict) or key not in found:
        raise UsageError(f"{file} has no {key!r}; make it with: {maker}")
    return found


def inspect_model(path: Path, audited: Mapping[str, Any] | None = None, remarks: Sequence[Mapping[str, Any]] = ()) -> Inspected:
    """Describe the model at `path`.

    Args:
        audited: the document of an audit of this model, set beside the plan.
        remarks: of its compilation.

    Raises:
        ModelError: the file cannot be used.
    """
    proto = read_proto(path, weights=False)
    model = Model.of_file(proto, path)
    graph, quantized = model.graph, quantized_tensors(model.graph)
    return Inspected(
        path=path,
        size_mb=round(file_bytes(path) / 1e6, 3),
        ir_version=model.ir.ir_version,
        opset=model.opset,
        inputs=tuple(_interface(v) for v in graph.inputs if v.name not in graph.initializers),
        outputs=tuple(_interface(v) for v in graph.outputs),
        nodes=dict(sorted(Counter(n.op_type for n in graph.all_nodes()).items())),
        parameters=sum(_size(v.const_value) for v in graph.initializers.values() if _is_parameter(v)),
        metadata=_metadata(model),
        quantized=quantized,
        weights=_weight_share(graph),
        compute=compute_nodes(proto, path, audited, remarks),
        integer=_integer_cost(model, proto, path),
        audit=None if audited is None else AuditFigures.of(audited),
        structures=None if quantized else _structures(graph),
    )


def _integer_cost(model: Model, proto: onnx.ModelProto, path: Path) -> Cost | None:
    """The widths follow from the proven ranges."""
    return prove(proto, str(path.parent)).cost if "qcompile.integer" in model.metadata else None


def quantized_tensors(graph: ir.Graph) -> tuple[QuantizedTensor, ...]:
    """The activations, then the stored tensors, in graph order."""
    activations = [_entry(n, "activation") for n in graph.all_nodes() if ops.is_op(n, "QuantizeLinear")]
    stored = (n for n in graph.all_nodes() if ops.is_op(n, "DequantizeLinear") and ops.is_const(n.inputs[0]))
    return (*activations, *(_entry(n, "weight") for n in stored))


def _entry(node: ir.Node, role: Literal["activation", "weight"]) -> QuantizedTensor:
    value = node.inputs[0]
    scale, zero = ops.const_array(node.inputs[1]), ops.const_array(ops.input_at(node, 2))
    name = value.name if value is not None else ""
    return QuantizedTensor(name, role, _code_type(node, role), _granularity(node, scale), *_span(scale), *_span(zero))


def _span(array: Any) -> tuple[float, float] | tuple[None, None]:
    """Smallest and largest."""
    if array is None:
        return None, None
    reals = np.asarray(array, np.float64)
    return float(reals.min()), float(reals.max())


def _code_type(node: ir.Node, role: str) -> str | None:
    stored = ops.const_value(node.inputs[0]) if role == "weight" else ops.const_value(ops.input_at(node, 2))
    if stored is not None:
        return stored.dtype.name.lower()
    declared = ops.int_attr(node, "output_dtype", 0)
    return ir.DataType(declared).name.lower() if declared else "uint8"


def _granularity(node: ir.Node, scale: Any) -> str:
    if scale is None or scale.size == 1:
        return "per-tensor"
    block = ops.int_attr(node, "block_size", 0)
    return f"per-block {block}" if block else f"per-axis {ops.int_attr(node, 'axis', 1)}"


def _weight_share(graph: ir.Graph) -> WeightShare:
    total = low = 0
    seen: set[str] = set()
    for node in graph.all_nodes():
        if not ops.is_compute(node):
            continue
        for value in node.inputs[:2]:
            name, elements, quantized = _weight_of(value)
            if name and name not in seen:
                seen.add(name)
                total, low = total + elements, low + (elements if quantized else 0)
    return WeightShare(total, low)


def _weight_of(value: ir.Value | None) -> tuple[str, int, bool]:
    """(name, elements, stored quantized) of the constant behind `value`; an empty name if it is computed."""
    quantized = False
    while value is not None and not ops.is_const(value):
        node = value.producer()
        if node is None or not ops.is_op(node, "DequantizeLinear", *_TRANSPARENT):
            return "", 0, False
        quantized = quantized or node.op_type == "DequantizeLinear"
        value = node.inputs[0]
    return (str(value.name), _size(ops.const_value(value)), quantized) if value is not None else ("", 0, False)


def _is_parameter(value: ir.Value) -> bool:
    """Weights: constants of a floating type, or codes behind a DequantizeLinear."""
    tensor = value.const_value
    if tensor is None:
        return False
    return tensor.dtype.is_floating_point() or any(ops.is_op(n, "DequantizeLinear") and slot == 0 for n, slot in value.uses())


def _size(tensor: ir.TensorProtocol | None) -> int:
    return 0 if tensor is None else int(tensor.size)


def _interface(value: ir.Value) -> TensorInfo:
    shape = None if value.shape is None else tuple(d if isinstance(d, int) else d.value for d in value.shape)
    return TensorInfo(value.name, value.dtype.name.lower() if value.dtype is not None else None, shape)


def _metadata(model: Model) -> dict[str, Any]:
    held = {k.removeprefix(PREFIX): v for k, v in model.metadata.items() if k.startswith(PREFIX)}
    return {k: _parsed(v) if k in _JSON_KEYS else v for k, v in sorted(held.items())}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _structures(graph: ir.Graph) -> dict[str, Found]:
    found = {name: find(graph) for name, find in _STRUCTURES.items()}
    return {name: Found(len(m.found), dict(Counter(r.reason for r in m.refused))) for name, m in found.items()}
