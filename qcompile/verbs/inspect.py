"""`qcompile inspect`: what is in a model, or known of an engine, as one JSON-ready dict."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qcompile import structure as match
from qcompile.backend.audit import audit
from qcompile.backend.engine_card import engine_card, engine_of
from qcompile.backend.precision import audit_figures, compute_nodes
from qcompile.errors import UsageError
from qcompile.ir import ops
from qcompile.ir.model import Model
from qcompile.ir.reader import read_proto
from qcompile.oracle.ranges import prove
from qcompile.report import SCHEMA_VERSION

PREFIX = "qcompile."
_JSON_KEYS = {"calibration", "facts", "shapes"}
_TRANSPARENT = ("Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze")
_STRUCTURES = {
    "norms": match.find_norms,
    "attentions": match.find_attentions,
    "mlps": match.find_mlps,
    "linears": match.find_linears,
    "residual_streams": match.find_residual_streams,
    "conv_chains": match.find_conv_chains,
}


def inspect(
    path: str | Path, *, audit_file: Path | None = None, gpu: str | None = None, remarks_file: Path | None = None
) -> dict[str, Any]:
    """Describe the ONNX model, engine or engine manifest at `path` (`kind`: "onnx" or "engine").

    Args:
        audit_file: what `qcompile audit --json` printed for this model.
        gpu: audit the model now for this GPU, e.g. sm89 (needs tensorrt-rtx).
        remarks_file: what `qcompile compile --remarks` wrote: why nodes were left in float.

    Returns:
        See `inspect_model` and `qcompile.backend.engine_card.engine_card`.

    Raises:
        ModelError: the file cannot be used; an engine has no manifest.
        UsageError: two audits, or one of another model; or options of models for an engine.
        BackendError: the audit cannot be made.
    """
    path = Path(path)
    engine = engine_of(path)
    if engine is None:
        remarks = [] if remarks_file is None else _document(remarks_file, "remarks", "qcompile compile --remarks")["remarks"]
        return inspect_model(path, _audit(path, audit_file, gpu), remarks)
    if audit_file or gpu or remarks_file:
        raise UsageError("--audit, --gpu and --remarks belong to an ONNX model; an engine's audit is in its manifest")
    return {"schema_version": SCHEMA_VERSION, "kind": "engine", "path": str(engine), **engine_card(engine)}


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


def inspect_model(
    path: str | Path, audited: Mapping[str, Any] | None = None, remarks: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Describe the model at `path`; nothing is run.

    Args:
        audited: the document of an audit of this model, set beside the plan.
        remarks: of its compilation.

    Returns:
        `schema_version, path, size_mb, ir_version, opset, inputs, outputs, nodes` (count by operator), `parameters`
        (elements of the weights), `metadata` (what qcompile wrote), `quantized` (one entry a tensor), `weights`
        (elements in all and quantized, `share`), `compute` (one entry a GEMM, convolution or attention product:
        `qcompile.backend.precision.compute_nodes`), `integer` (what an integer-only model costs a sample:
        `qcompile.oracle.ranges.Proof.cost`, else null), `audit` (the audit's figures or null) and `structures` (null for a
        quantized model: its weights are behind DequantizeLinear, where the matchers do not look).

    Raises:
        ModelError: the file cannot be used.
    """
    proto = read_proto(path, weights=False)
    model = Model.of_file(proto, Path(path))
    quantized = quantized_tensors(model.graph)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "onnx",
        "path": str(path),
        "size_mb": round(model_bytes(model) / 1e6, 3),
        "ir_version": model.ir.ir_version,
        "opset": model.opset,
        "inputs": [_interface(v) for v in model.graph.inputs if v.name not in model.graph.initializers],
        "outputs": [_interface(v) for v in model.graph.outputs],
        "nodes": dict(sorted(Counter(n.op_type for n in model.graph.all_nodes()).items())),
        "parameters": sum(_size(v.const_value) for v in model.graph.initializers.values() if _is_parameter(v)),
        "metadata": _metadata(model),
        "quantized": quantized,
        "weights": _weight_share(model.graph),
        "compute": compute_nodes(proto, Path(path), audited, remarks),
        "integer": _integer_cost(model, proto, Path(path)),
        "audit": None if audited is None else audit_figures(audited),
        "structures": None if quantized else _structures(model.graph),
    }


def _integer_cost(model: Model, proto: onnx.ModelProto, path: Path) -> dict[str, Any] | None:
    """`macs, bops, weight_bytes, layers`; the widths follow from the proven ranges."""
    return prove(proto, str(path.parent)).cost.to_json() if "qcompile.integer" in model.metadata else None


def model_bytes(model: Model) -> int:
    """Size on disk of the file that a model came from, with its external data files."""
    assert model.path is not None
    tensors = (v.const_value for v in model.graph.initializers.values())
    files = {model.path.parent / t.location for t in tensors if isinstance(t, ir.ExternalTensor)}
    return model.path.stat().st_size + sum(f.stat().st_size for f in files)


def quantized_tensors(graph: ir.Graph) -> list[dict[str, Any]]:
    """One dict for each quantized tensor, in graph order.

    Keys: `tensor, role` ("activation" or "weight"), `dtype, granularity` ("per-tensor", "per-axis N", "per-block N"),
    `scale_min, scale_max, zero_point_min, zero_point_max` (null when computed or absent).
    """
    activations = [_entry(n, "activation", n.inputs[0]) for n in graph.all_nodes() if ops.is_op(n, "QuantizeLinear")]
    stored = (n for n in graph.all_nodes() if ops.is_op(n, "DequantizeLinear") and ops.is_const(n.inputs[0]))
    return activations + [_entry(n, "weight", n.inputs[0]) for n in stored]


def _entry(node: ir.Node, role: str, value: ir.Value | None) -> dict[str, Any]:
    scale, zero = ops.const_array(node.inputs[1]), ops.const_array(ops.input_at(node, 2))
    return {
        "tensor": value.name if value is not None else "",
        "role": role,
        "dtype": _code_type(node, role),
        "granularity": _granularity(node, scale),
        "scale_min": None if scale is None else float(scale.min()),
        "scale_max": None if scale is None else float(scale.max()),
        "zero_point_min": None if zero is None else float(np.asarray(zero, np.float64).min()),
        "zero_point_max": None if zero is None else float(np.asarray(zero, np.float64).max()),
    }


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


def _weight_share(graph: ir.Graph) -> dict[str, Any]:
    """Elements of the weights of all matrix products and convolutions, and how many of them are stored quantized."""
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
    return {"elements": total, "quantized": low, "share": low / total if total else None}


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


def _interface(value: ir.Value) -> dict[str, Any]:
    shape = None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]
    return {"name": value.name, "dtype": value.dtype.name.lower() if value.dtype is not None else None, "shape": shape}


def _metadata(model: Model) -> dict[str, Any]:
    held = {k.removeprefix(PREFIX): v for k, v in model.metadata.items() if k.startswith(PREFIX)}
    return {k: _parsed(v) if k in _JSON_KEYS else v for k, v in sorted(held.items())}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _structures(graph: ir.Graph) -> dict[str, dict[str, Any]]:
    found = {name: find(graph) for name, find in _STRUCTURES.items()}
    return {name: {"found": len(m.found), "refused": dict(Counter(r.reason for r in m.refused))} for name, m in found.items()}
