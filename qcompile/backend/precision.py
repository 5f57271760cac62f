"""The precision of every GEMM, convolution and attention product: as its inputs plan it, and as a builder chose it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto

from qcompile.backend.dump import COMPUTE_KERNELS, LOW_DATATYPES
from qcompile.backend.work import WorkItem, work_items
from qcompile.errors import UsageError
from qcompile.target.view import GraphView, uniquely_named

FLOAT = "float"
ATTENTION = "_mha"  # in the names of fused attention kernels


@dataclass(frozen=True)
class Chosen:
    """What a builder made of a node: `low` is a low type, "float", or None when no kernel names the node; the kernels' kinds."""

    low: str | None
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class ComputeNode:
    """One compute node.

    `inputs`: the type each compute input is read from (the codes' type, or the float type).  `planned`: the low type of all
    inputs, or "float".  `weight_only`: the type of the weight's codes when only they are quantized.  `reasons`: why it was
    left in float.  `chosen`: with an audit.
    """

    node: str
    op_type: str
    inputs: tuple[str, ...]
    planned: str
    weight_only: str | None
    reasons: tuple[str, ...]
    chosen: Chosen | None = None

    @property
    def audited(self) -> str | None:
        """What was built; None without an audit, and where no kernel names the node."""
        return None if self.chosen is None else self.chosen.low

    @property
    def kept(self) -> bool | None:
        """Whether it was built as planned; None where that is not known."""
        return None if self.audited is None else self.audited == self.planned

    def to_json(self) -> dict[str, Any]:
        """`node, op_type, inputs, planned, weight_only, reasons`, and with an audit `audited, kernels, kept`."""
        head = {k: v for k, v in vars(self).items() if k != "chosen"} | {
            "inputs": list(self.inputs), "reasons": list(self.reasons),
        }  # fmt: skip
        if self.chosen is None:
            return head
        return {**head, "audited": self.audited, "kernels": list(self.chosen.kernels), "kept": self.kept}


@dataclass(frozen=True)
class AuditFigures:
    """The figures of an audit that stand for all of it (see `AuditResult`); None where the document lacks one."""

    gpu: str | None
    label: str | None
    version: str | None
    share: float | None
    coverage: float | None
    attention_blocks: int | None
    attention_fused_blocks: int | None

    @classmethod
    def of(cls, audit: Mapping[str, Any]) -> AuditFigures:
        """From the document of an audit."""
        return cls(**{f.name: audit.get(f.name) for f in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """Plain dict."""
        return asdict(self)


def compute_nodes(
    model: ModelProto, path: Path, audit: Mapping[str, Any] | None = None, remarks: Sequence[Mapping[str, Any]] = ()
) -> tuple[ComputeNode, ...]:
    """The compute nodes of `model` (read from `path`), in graph order.

    Args:
        audit: the document of `qcompile audit --json` for this model.
        remarks: those that `qcompile compile --remarks` wrote; they say why a node was left in float.

    Raises:
        UsageError: the audit is of another model.
    """
    view = GraphView(uniquely_named(model), path.parent)
    by_name = {n.name: n for n in view.nodes}
    reasons = _reasons(remarks)
    nodes = tuple(_planned(view, item, by_name[item.node], reasons.get(item.node, ())) for item in work_items(view, {}))
    if audit is None:
        return nodes
    kernels = _kernels(audit)
    if nodes and not any(n.node in kernels for n in nodes):
        raise UsageError(
            f"the audit names no compute node of {path}: it is of another model; make it with: qcompile audit {path} --json"
        )
    floats = {n["node"] for n in audit["float_nodes"]}
    return tuple(replace(n, chosen=_chosen(kernels.get(n.node, []), n.node in floats)) for n in nodes)


def _planned(view: GraphView, item: WorkItem, node: NodeProto, reasons: tuple[str, ...]) -> ComputeNode:
    slots = node.input[: 3 if node.op_type == "Attention" else 2]
    types = tuple(_read_type(view, name) for name in slots)
    return ComputeNode(item.node, item.op_type, types, item.low_type or FLOAT, item.weight_type, reasons)


def _read_type(view: GraphView, name: str) -> str:
    dq = view.dequantizer(name)
    low = None if dq is None else view.low_type(dq)
    return low or TensorProto.DataType.Name(view.elem_types.get(name, 0)).lower()


def _reasons(remarks: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for r in remarks:
        if r["kind"] == "missed":
            found.setdefault(r["node"], []).append(f"{r['pass']}: {r['reason']}")
    return {node: tuple(dict.fromkeys(texts)) for node, texts in found.items()}


def _kernels(audit: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for kernel in audit["kernels"]:
        for node in kernel["nodes"] if _computes(kernel) else ():
            found.setdefault(node, []).append(kernel)
    return found


def _computes(kernel: Mapping[str, Any]) -> bool:
    """As `Kernel.compute`: epilogues repeat the names of the nodes and do not count."""
    return kernel["type"] in COMPUTE_KERNELS or ATTENTION in kernel["name"]


def _chosen(kernels: Sequence[Mapping[str, Any]], runs_in_float: bool) -> Chosen:
    low = [LOW_DATATYPES[t] for k in kernels for t in k["inputs"] if t in LOW_DATATYPES]
    audited = None if not kernels else FLOAT if runs_in_float or not low else low[0]
    return Chosen(audited, tuple(sorted({"attention" if ATTENTION in k["name"] else str(k["type"]) for k in kernels})))
