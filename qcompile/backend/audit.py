"""The kernel audit: which GEMMs, convolutions and attention products of a Q/DQ model really run at low precision.

Builds the model with TensorRT-RTX for one compute capability (no GPU needed), reads the kernel dump and maps the
kernels back to ONNX nodes by the names in their metadata.  It is a proxy: other TensorRT versions may choose otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.backend.dump import TESTED, Kernel, covering, parse_dump
from qcompile.backend.naming import dumpable_file
from qcompile.backend.process import ENGINES
from qcompile.backend.profile import Profile
from qcompile.backend.shapes import concrete_shapes
from qcompile.backend.tensorrt import plan_profiles, run_worker
from qcompile.backend.work import COMPUTE_OPS, WorkItem, work_items
from qcompile.errors import UsageError
from qcompile.ir.reader import read_proto
from qcompile.report import listed
from qcompile.target.attention import attention_blocks, attention_products
from qcompile.target.catalog import TARGETS
from qcompile.target.check import check
from qcompile.target.view import GraphView, inner_nodes, uniquely_named

SCHEMA_VERSION = 1
NAMED = 3  # nodes in a note
UNKNOWN = "no reason is known: every condition for one kernel that was found holds"
LABELS = {name: e.label for name, e in ENGINES.items()}


@dataclass(frozen=True)
class AuditedNode:
    """A work item with the kernels that compute it and the low type that all of them read (None: float)."""

    item: WorkItem
    kernels: tuple[Kernel, ...]
    reads: str | None

    @property
    def flops(self) -> int:
        """2 x multiply-adds at the optimum shapes; 0 when the shapes are unknown."""
        return self.item.flops or 0

    @property
    def kept_promise(self) -> bool:
        """Whether the node was planned at a low type and runs in it."""
        return self.item.low_type is not None and self.item.low_type == self.reads


@dataclass(frozen=True)
class WastedPair:
    """A DequantizeLinear whose consumer runs in float although it is not weight-only, and the rule that explains it."""

    pair: str
    node: str
    rule: str

    def to_json(self) -> dict[str, Any]:
        """The keys pair, node, rule."""
        return dict(vars(self))


@dataclass(frozen=True)
class Unfused:
    """An attention block, by its softmax, that is not one kernel, and why."""

    node: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        """The keys node, reason."""
        return dict(vars(self))


@dataclass(frozen=True)
class AuditResult:
    """What runs where; `attention` counts (blocks, blocks that run as one fused kernel).

    `unread`: lines of the kernel dump whose form is not known; what only they compute counts as float.  `blind`: no line says
    which nodes it covers, so that nothing is known of any of them (no nodes, no figures).  `in_bodies`: nodes that multiply
    matrices in the bodies of If, Loop and Scan, which are not audited.
    """

    gpu: str
    target: str
    version: str
    profile: Profile | None
    nodes: tuple[AuditedNode, ...]
    kernels: tuple[Kernel, ...]
    attention: tuple[int, int]
    wasted_pairs: tuple[WastedPair, ...]
    unread: int = 0
    blind: bool = False
    unfused: tuple[Unfused, ...] = ()
    in_bodies: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What the figures do not say."""
        unsized = [n.item.node for n in self.nodes if n.item.flops is None]
        said = (
            (self.unread, lambda: _unread(self)),
            (unsized, lambda: f"the figures leave out what has no known size: {listed(unsized, NAMED)}"),
            (self.in_bodies, lambda: f"the figures leave out {self.in_bodies} products in bodies of If, Loop and Scan"),
        )
        blocks: dict[str, list[str]] = {}
        for u in self.unfused:
            blocks.setdefault(u.reason, []).append(u.node)
        split = (f"attention in several kernels at {listed(names, NAMED)}: {reason}" for reason, names in blocks.items())
        return (*split, *(text() for there, text in said if there))

    @property
    def total_flops(self) -> int:
        """All GEMM, convolution and attention-product work."""
        return sum(n.flops for n in self.nodes)

    @property
    def planned_flops(self) -> int:
        """Work whose compute inputs all come from DQ at one low type."""
        return sum(n.flops for n in self.nodes if n.item.low_type is not None)

    @property
    def low_precision_flops(self) -> int:
        """Work in kernels that read low types on both sides."""
        return sum(n.flops for n in self.nodes if n.reads is not None)

    @property
    def share(self) -> float | None:
        """The part of the planned work that runs in kernels reading its type; None when nothing is planned."""
        kept = sum(n.flops for n in self.nodes if n.kept_promise)
        return kept / self.planned_flops if self.planned_flops else None

    @property
    def coverage(self) -> float | None:
        """Low-precision work over all work; None when there is none."""
        return self.low_precision_flops / self.total_flops if self.total_flops else None

    @property
    def attention_fused(self) -> float | None:
        """The part of the attention blocks that run as one kernel; None without attention."""
        blocks, fused = self.attention
        return fused / blocks if blocks else None

    @property
    def label(self) -> str:
        """What built it: a proxy, or the target itself."""
        return LABELS[self.target]

    @property
    def weight_only_flops(self) -> int:
        """Work in float that reads low-precision weights."""
        return sum(n.flops for n in self.nodes if n.item.weight_type is not None and n.reads is None)

    @property
    def float_nodes(self) -> tuple[AuditedNode, ...]:
        """Nodes that run in float."""
        return tuple(n for n in self.nodes if n.reads is None)

    def summary(self) -> dict[str, Any]:
        """The figures without the per-kernel lists (this goes into an engine's manifest)."""
        return {
            "schema_version": SCHEMA_VERSION,
            "label": self.label,
            "gpu": self.gpu,
            "version": self.version,
            "version_tested": self.version in TESTED,
            "profile": None if self.profile is None else {"shapes": self.profile.to_json(), "source": self.profile.source},
            "share": self.share,
            "coverage": self.coverage,
            "planned_flops": self.planned_flops,
            "low_precision_flops": self.low_precision_flops,
            "total_flops": self.total_flops,
            "attention_fused": self.attention_fused,
            "attention_blocks": self.attention[0],
            "attention_fused_blocks": self.attention[1],
            "attention_unfused": [u.to_json() for u in self.unfused],
            "weight_only_flops": self.weight_only_flops,
            "unread_lines": self.unread,
            "notes": list(self.notes),
            "unsized_nodes": [n.item.node for n in self.nodes if n.item.flops is None],
        }

    def to_json(self) -> dict[str, Any]:
        """`summary` with `kernels`, `float_nodes` and `wasted_pairs`."""
        return {
            **self.summary(),
            "float_nodes": [_float_node(n) for n in self.float_nodes],
            "wasted_pairs": [w.to_json() for w in self.wasted_pairs],
            "kernels": [k.to_json() for k in self.kernels],
        }


def audit(onnx_path: str | Path, gpu: str = "sm89", profile: Profile | None = None, target: str = "rtx") -> AuditResult:
    """Build the model for `gpu` and attribute its work.

    FLOPs are counted at the optimum of `profile` (default: `default_profile`).

    Raises:
        ModelError, UsageError, BackendError: as `build_engine`.
    """
    if target not in LABELS:
        raise UsageError(f"target {target!r} has no kernel audit; use rtx")
    path = Path(onnx_path)
    model = read_proto(path, weights=False)
    view = GraphView(uniquely_named(model), path.parent)
    profiles = plan_profiles(view.model, None if profile is None else [profile])
    with dumpable_file(path, model) as (file, names):
        plan = run_worker(file, None, target=target, gpus=[gpu], profiles=profiles, layers=True)
    dump, used = parse_dump(plan.layers, names), profiles[0] if profiles else None
    nodes = () if dump.blind else audited_nodes(view, dump.kernels, used)
    attention = (0, 0) if dump.blind else _attention(view, dump.kernels)
    unfused = () if dump.blind else unfused_blocks(view, dump.kernels, used, target)
    wasted = wasted_pairs(view, nodes, target, gpu)
    inner = sum(n.op_type in COMPUTE_OPS for n in inner_nodes(view.model.graph))
    return AuditResult(
        gpu, target, plan.version, used, nodes, dump.kernels, attention, wasted,
        unread=dump.unread, blind=dump.blind, in_bodies=inner, unfused=unfused,
    )  # fmt: skip


def _unread(a: AuditResult) -> str:
    known = "" if a.version in TESTED else f"; the audit was tested with {', '.join(TESTED)}: install tensorrt-rtx=={TESTED[-1]}"
    effect = "nothing is known of the kernels" if a.blind else "what only they compute counts as float"
    lines = f"{a.unread} of {a.unread + len(a.kernels)} lines"
    return f"{lines} of the kernel dump of {a.label} {a.version} have an unknown form, so {effect}{known}"


def audited_nodes(view: GraphView, kernels: Sequence[Kernel], profile: Profile | None) -> tuple[AuditedNode, ...]:
    """Every work item of the graph with its kernels."""
    items = work_items(view, concrete_shapes(view.model, profile.optimum() if profile else {}))
    cover = covering(kernels)
    return tuple(_audited(item, cover.get(item.node, [])) for item in items)


def _audited(item: WorkItem, kernels: Sequence[Kernel]) -> AuditedNode:
    """A node spread over several compute kernels is low precision only if all of them are."""
    reads = {k.reads() for k in kernels}
    return AuditedNode(item, tuple(kernels), reads.pop() if len(reads) == 1 else None)


def _attention(view: GraphView, kernels: Sequence[Kernel]) -> tuple[int, int]:
    blocks = attention_products(view)
    return len(blocks), sum(_fused(block, kernels) for block in blocks)


def _fused(products: frozenset[str], kernels: Sequence[Kernel]) -> bool:
    return any(k.attention and products <= set(k.nodes) for k in kernels)


def unfused_blocks(view: GraphView, kernels: Sequence[Kernel], profile: Profile | None, target: str) -> tuple[Unfused, ...]:
    """The attention blocks that are not one kernel, each with the reasons that are known."""
    blocks = [b for b in attention_blocks(view) if not _fused(frozenset(n.name for n in b.products), kernels)]
    if not blocks:
        return ()
    ends = [{name: getattr(r, end) for name, r in profile.shapes.items()} if profile else {} for end in ("min", "max")]
    smallest, largest = (concrete_shapes(view.model, end) for end in ends)
    found = ((b.softmax.name, TARGETS[target].unfused(view, b, smallest, largest)) for b in blocks)
    return tuple(Unfused(name, "; ".join(reasons) or UNKNOWN) for name, reasons in found)


def wasted_pairs(view: GraphView, nodes: Sequence[AuditedNode], target: str, gpu: str) -> tuple[WastedPair, ...]:
    """DequantizeLinear nodes whose consumer runs in float although it is not weight-only, with the rule that explains it."""
    rules = {f.node: f.rule for f in check(view, target, [gpu])}
    wasted: list[WastedPair] = []
    by_name = {n.name: n for n in view.nodes}
    for audited in nodes:
        if audited.reads is not None or audited.item.weight_type is not None:
            continue
        sources = [dq for x in by_name[audited.item.node].input[:3] if (dq := view.dequantizer(x)) is not None]
        likely = [rules[n] for n in (audited.item.node, *(dq.name for dq in sources)) if n in rules]
        wasted += [WastedPair(dq.name, audited.item.node, likely[0] if likely else "") for dq in sources]
    return tuple(wasted)


def _float_node(n: AuditedNode) -> dict[str, Any]:
    dtypes = [x.dtype for k in n.kernels for x in k.inputs]
    kernel = {"kernels": [k.type for k in n.kernels], "inputs": dtypes}
    return {"node": n.item.node, "op_type": n.item.op_type, "flops": n.item.flops, "planned": n.item.low_type, **kernel}
