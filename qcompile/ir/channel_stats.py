"""What is known of a tensor without any data: mean and standard deviation of each channel, left by BatchNormalization.

Kept in the metadata of the node that makes the tensor; `linear_edit` moves them with the channels.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

F64 = NDArray[np.float64]
KEY = "qcompile.channel_stats"


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
    producer.metadata_props[KEY] = json.dumps(doc, separators=(",", ":"))


def channel_stats(value: ir.Value) -> ChannelStats | None:
    """The statistics noted for `value`, or None."""
    producer = value.producer()
    text = None if producer is None else producer.metadata_props.get(KEY)
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
        producer.metadata_props.pop(KEY, None)
