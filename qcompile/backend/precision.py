"""The precision of every GEMM, convolution and attention product: as its inputs plan it, and as a builder chose it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto

from qcompile.backend.dump import COMPUTE_KERNELS, LOW_DATATYPES
from qcompile.backend.work import WorkItem, work_items
from qcompile.errors import UsageError
from qcompile.target.view import GraphView, uniquely_named

FLOAT = "float"
ATTENTION = "_mha"  # in the names of fused attention kernels
SUMMARY = ("gpu", "label", "version", "share", "coverage", "attention_blocks", "attention_fused_blocks")


def compute_nodes(
    model: ModelProto, path: Path, audit: Mapping[str, Any] | None = None, remarks: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """One dict for each compute node of `model` (read from `path`), in graph order.

    Args:
        audit: the document of `qcompile audit --json` for this model.
        remarks: those that `qcompile compile --remarks` wrote; they say why a node was left in float.

    Returns:
        `node, op_type, inputs` (the type each compute input is read from: the codes' type, or the float type),
        `planned` (the low type of all inputs, or "float"), `weight_only` (the type of the weight's codes when only
        they are quantized, else null), `reasons`, and with an audit `audited` (a low type, "float", or null when no
        kernel names the node), `kernels` (their kinds) and `kept` (audited as planned; null with
        `audited`).

    Raises:
        UsageError: the audit is of another model.
    """
    view = GraphView(uniquely_named(model), path.parent)
    items = work_items(view, {})
    by_name = {n.name: n for n in view.nodes}
    reasons = _reasons(remarks)
    nodes = [_planned(view, item, by_name[item.node], reasons.get(item.node, [])) for item in items]
    if audit is None:
        return nodes
    kernels = _kernels(audit)
    if nodes and not any(n["node"] in kernels for n in nodes):
        raise UsageError(
            f"the audit names no compute node of {path}: it is of another model; make it with: qcompile audit {path} --json"
        )
    floats = {n["node"] for n in audit["float_nodes"]}
    return [{**n, **_audited(n, kernels.get(n["node"], []), n["node"] in floats)} for n in nodes]


def audit_figures(audit: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of an audit document that stand for all of it."""
    return {key: audit.get(key) for key in SUMMARY}


def _planned(view: GraphView, item: WorkItem, node: NodeProto, reasons: Sequence[str]) -> dict[str, Any]:
    slots = node.input[: 3 if node.op_type == "Attention" else 2]
    return {
        "node": item.node,
        "op_type": item.op_type,
        "inputs": [_read_type(view, name) for name in slots],
        "planned": item.low_type or FLOAT,
        "weight_only": item.weight_type,
        "reasons": list(reasons),
    }


def _read_type(view: GraphView, name: str) -> str:
    dq = view.dequantizer(name)
    low = None if dq is None else view.low_type(dq)
    return low or TensorProto.DataType.Name(view.elem_types.get(name, 0)).lower()


def _reasons(remarks: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for r in remarks:
        if r["kind"] == "missed":
            found.setdefault(r["node"], []).append(f"{r['pass']}: {r['reason']}")
    return {node: list(dict.fromkeys(texts)) for node, texts in found.items()}


def _kernels(audit: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for kernel in audit["kernels"]:
        for node in kernel["nodes"] if _computes(kernel) else ():
            found.setdefault(node, []).append(kernel)
    return found


def _computes(kernel: Mapping[str, Any]) -> bool:
    """As `Kernel.compute`: epilogues repeat the names of the nodes and do not count."""
    return kernel["type"] in COMPUTE_KERNELS or ATTENTION in kernel["name"]


def _audited(node: Mapping[str, Any], kernels: Sequence[Mapping[str, Any]], runs_in_float: bool) -> dict[str, Any]:
    low = [LOW_DATATYPES[t] for k in kernels for t in k["inputs"] if t in LOW_DATATYPES]
    audited = None if not kernels else FLOAT if runs_in_float or not low else low[0]
    kinds = {"attention" if ATTENTION in k["name"] else str(k["type"]) for k in kernels}
    return {"audited": audited, "kernels": sorted(kinds), "kept": None if audited is None else audited == node["planned"]}
