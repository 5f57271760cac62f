"""space-to-depth: a picture's first convolution in a form that integer kernels are fast at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.calib.observe.change import Changes
from qcompile.ir.edit import insert_after, new_node, set_constant
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array, is_op
from qcompile.pipeline.base import Kind, PassContext, Stage
from qcompile.pipeline.site import Applied, Missed, SitePass
from qcompile.structure import Matches

_FEW_CHANNELS = 4


@dataclass(frozen=True)
class SpaceToDepthStem(SitePass[ir.Node]):
    """Let the stride-2 convolution of a picture read 2x2 blocks of pixels as channels.

    before: Conv(x [N, 3, H, W], W [O, 3, 7, 7], strides 2)
    after:  Conv(SpaceToDepth(x, 2) [N, 12, H/2, W/2], W' [O, 12, 4, 4], strides 1);  W' is W with zeros around it, reordered
    ONNX Runtime's integer convolution needs a multiple of 4 input channels for its fast kernel: the stem of ResNet-18
    takes a third of the integer model's time without this.
    """

    name = "space-to-depth"
    nothing = "no convolution reads the model's input"
    kind = Kind.EQUIVALENT
    needs = Stage.CANONICAL
    after = ("fold-bn",)

    def sites(self, model: Model, ctx: PassContext) -> Matches[ir.Node]:
        """Every convolution that reads a graph input."""
        convs = (n for n in model.graph if is_op(n, "Conv") and n.inputs[0] is not None and n.inputs[0].is_graph_input())
        return Matches(tuple(convs))

    def nodes(self, site: ir.Node) -> Iterable[ir.Node]:
        """Selectors say what is quantized, which this does not touch."""
        return ()

    def rewrite(self, model: Model, site: ir.Node, ctx: PassContext, changes: Changes) -> Applied | Missed:
        """Put SpaceToDepth in front and reorder the weight."""
        if reason := _refusal(site):
            return Missed(reason)
        x, weight, picture = site.inputs[0], const_array(site.inputs[1]), _picture(site)
        assert x is not None and weight is not None and picture is not None
        sizes, pads = _padding(site, weight, picture), _pads(site)
        packed = _pack(weight, (pads[0] % 2, pads[1] % 2))
        _read_blocks(model.graph, site, x, [picture[0], 4 * weight.shape[1], picture[1] // 2, picture[2] // 2])
        set_constant(site, 1, packed)
        _set(site, "strides", [1, 1])
        _set(site, "kernel_shape", list(packed.shape[2:]))
        _set(site, "pads", [begin for begin, _ in sizes] + [end for _, end in sizes])
        return Applied(f"{weight.shape[1]} channels became {4 * weight.shape[1]}", {"kernel": int(packed.shape[2])})


def _read_blocks(graph: ir.Graph, conv: ir.Node, x: ir.Value, shape: list[Any]) -> None:
    """Let the convolution read SpaceToDepth(x), which has `shape`."""
    blocks = new_node(graph, "SpaceToDepth", [x], name=f"{conv.name}_blocks", attributes={"blocksize": 2})
    blocks.outputs[0].type = x.type
    blocks.outputs[0].shape = ir.Shape(shape)
    insert_after(graph, x, blocks)
    conv.replace_input_with(0, blocks.outputs[0])


def _refusal(conv: ir.Node) -> str | None:
    weight, picture = const_array(conv.inputs[1]), _picture(conv)
    if weight is None or weight.ndim != 4 or picture is None:
        return "its weight is not constant, or the picture's height and width are not known"
    if _ints(conv, "strides", [1, 1]) != [2, 2] or _ints(conv, "dilations", [1, 1]) != [1, 1] or _int(conv, "group", 1) != 1:
        return "not a plain convolution of stride 2"
    if weight.shape[1] > _FEW_CHANNELS or picture[1] % 2 or picture[2] % 2:
        return f"it has {weight.shape[1]} input channels (at most {_FEW_CHANNELS} gain) or an odd height or width"
    if "auto_pad" in conv.attributes and conv.attributes["auto_pad"].as_string() not in ("", "NOTSET", "VALID"):
        return "auto_pad is not written out"
    if any(end < 0 for _, end in _padding(conv, weight, picture)):
        return "its padding has no counterpart in blocks"
    return None


def _padding(conv: ir.Node, weight: NDArray[Any], picture: tuple[Any, int, int]) -> list[tuple[int, int]]:
    """Blocks of padding (begin, end) of the rows and of the columns."""
    pads = _pads(conv)
    return [_axis(weight.shape[2 + i], picture[1 + i], pads[i], pads[2 + i]) for i in range(2)]


def _axis(kernel: int, size: int, before: int, after: int) -> tuple[int, int]:
    """Padding in blocks before and after one axis, so that the output keeps its length."""
    length = (size + before + after - kernel) // 2 + 1
    start = (before + before % 2) // 2
    blocks = -(-(kernel + before % 2) // 2)
    return start, length - 1 - size // 2 - start + blocks


def _pack(weight: NDArray[Any], shift: tuple[int, int]) -> NDArray[Any]:
    """[O, C, K, L] -> [O, 4C, K', L'] in SpaceToDepth's channel order (row in block, column in block, channel)."""
    o, c, k, m = weight.shape
    rows, columns = -(-(k + shift[0]) // 2), -(-(m + shift[1]) // 2)
    wide = np.zeros((o, c, 2 * rows, 2 * columns), weight.dtype)
    wide[:, :, shift[0] : shift[0] + k, shift[1] : shift[1] + m] = weight
    return wide.reshape(o, c, rows, 2, columns, 2).transpose(0, 3, 5, 1, 2, 4).reshape(o, 4 * c, rows, columns)


def _picture(conv: ir.Node) -> tuple[int | ir.SymbolicDim, int, int] | None:
    """N, H, W of the input, H and W known."""
    value = conv.inputs[0]
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    height, width = value.shape[2], value.shape[3]
    return (value.shape[0], height, width) if isinstance(height, int) and isinstance(width, int) else None


def _pads(conv: ir.Node) -> list[int]:
    return _ints(conv, "pads", [0, 0, 0, 0])


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else default


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _set(node: ir.Node, name: str, values: list[int]) -> None:
    node.attributes[name] = ir.AttrInt64s(name, values)
