"""Notes that passes leave on nodes for later passes: short ones as text in the nodes' metadata, objects in their `meta`.

Objects with a `to_text` are written into files as metadata, under the same key.

claimed        the pass that rewrote a fold site first
folded         a fold changed the channels of this layer's input
kept float     a pass made the node, and why it is not meant to be quantized
channel stats  mean and standard deviation of each channel of what the node makes, known from BatchNormalization without any
               data; `qcompile.rewrite.linear` moves them with the channels
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.select import ORIGIN, names

F64 = NDArray[np.float64]
CLAIM = "qcompile.claimed_by"
FOLDED = "qcompile.input_folded"
KEPT = "qcompile.keep_float"
STATS = "qcompile.channel_stats"


@runtime_checkable
class Spelled(Protocol):
    """A note that files hold as text; nobody edits it in place, since clones share it."""

    def to_text(self, node: ir.Node, key: str) -> str: ...


def spelled(model: ir.Model) -> Iterator[tuple[ir.Node, str, Spelled]]:
    """The notes of `model` that are objects, with their nodes and keys."""
    for node in model.graph.all_nodes():
        yield from ((node, key, note) for key, note in node.meta.items() if isinstance(note, Spelled))


def spell(model: ir.Model) -> None:
    """Write notes that are objects into the metadata too: on a copy that becomes a file."""
    for node, key, note in list(spelled(model)):
        node.metadata_props[key] = note.to_text(node, key)


def carry_notes(source: ir.Node, target: ir.Node) -> None:
    """Give `target`, the same node in another graph, all notes and metadata of `source`."""
    target.metadata_props.update(source.metadata_props)
    target.meta.update({key: note for key, note in source.meta.items() if isinstance(note, Spelled)})


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """`mean` and `std` of each channel, float64 [C]."""

    mean: F64
    std: F64


def set_channel_stats(value: ir.Value, stats: ChannelStats) -> None:
    """Note the statistics on the producer of `value`."""
    producer = value.producer()
    assert producer is not None
    doc = {name: base64.b64encode(a.astype("<f8").tobytes()).decode() for name, a in (("mean", stats.mean), ("std", stats.std))}
    producer.metadata_props[STATS] = json.dumps(doc, separators=(",", ":"))


def channel_stats(value: ir.Value) -> ChannelStats | None:
    """The statistics noted for `value`, or None."""
    producer = value.producer()
    text = None if producer is None else producer.metadata_props.get(STATS)
    if text is None:
        return None
    doc = json.loads(text)
    return ChannelStats(*(np.frombuffer(base64.b64decode(doc[name]), "<f8") for name in ("mean", "std")))


def move_channel_stats(value: ir.Value, scale: F64 | float = 1.0, shift: F64 | float = 0.0) -> None:
    """x' = x scale + shift in each channel of `value`."""
    stats = channel_stats(value)
    if stats is not None:
        set_channel_stats(value, ChannelStats(stats.mean * scale + shift, stats.std * np.abs(scale)))


def forget_channel_stats(value: ir.Value) -> None:
    """The channels of `value` were mixed."""
    producer = value.producer()
    if producer is not None:
        producer.metadata_props.pop(STATS, None)


def mark_folded(node: ir.Node) -> None:
    """Note on a linear layer that a fold changed the channels of its input."""
    node.metadata_props[FOLDED] = "1"


def input_folded(node: ir.Node) -> bool:
    """Whether a fold changed the channels of this layer's input: its rows and per-channel extremes are known."""
    return FOLDED in node.metadata_props


def keep_float(node: ir.Node, reason: str) -> None:
    """Note on a node that a pass made and that is not meant to be quantized."""
    node.metadata_props[KEPT] = reason


def kept_float(node: ir.Node) -> str | None:
    """Why this node is not meant to be quantized, or None."""
    return node.metadata_props.get(KEPT)


def copy_notes(source: ir.Node, target: ir.Node) -> None:
    """Hand a node's notes on to the node that takes its place; selectors still find it by the old name."""
    target.metadata_props.setdefault(ORIGIN, names(source)[-1])
    target.metadata_props.update({k: v for k, v in source.metadata_props.items() if k in (CLAIM, FOLDED, KEPT)})


def claim(node: ir.Node, pass_name: str) -> None:
    """Mark the producer of a fold site as rewritten by `pass_name`."""
    node.metadata_props[CLAIM] = pass_name


def claimed_by(node: ir.Node) -> str | None:
    """The pass that rewrote this fold site first, or None."""
    return node.metadata_props.get(CLAIM)
