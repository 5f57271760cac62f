"""space-to-depth: a picture's first convolution in a form that integer kernels are fast at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qcompile.ir.edit import add_constant, insert_after, new_node
from qcompile.ir.model import Model
from qcompile.ir.ops import const_array, is_op
from qcompile.pipeline.base import Fact, Kind, Pass, PassContext, PassResult

_FEW_CHANNELS = 4


@dataclass(frozen=True)
class SpaceToDepthStem(Pass):
    """Let the stride-2 convolution of a picture read 2x2 blocks of pixels as channels.

    before: Conv(x [N, 3, H, W], W [O, 3, 7, 7], strides 2)
    after:  Conv(SpaceToDepth(x, 2) [N, 12, H/2, W/2], W' [O, 12, 4, 4], strides 1);  W' is W with zeros around it, reordered
    ONNX Runtime's integer convolution needs a multiple of 4 input channels for its fast kernel: the stem of ResNet-18
    takes a third of the integer model's time without this.
    """

    name = "space-to-depth"
    kind = Kind.EQUIVALENT
    requires = frozenset({Fact.CANONICAL, Fact.BN_FOLDED})

    def apply(self, model: Model, ctx: PassContext) -> PassResult:
        """Rewrite every convolution that reads a graph input."""
        stems = [n for n in model.graph if is_op(n, "Conv") and n.inputs[0] is not None and n.inputs[0].is_graph_input()]
        if not stems:
            ctx.note("", "no convolution reads the model's input")
        return PassResult(bool([True for node in stems if _rewrite(model.graph, node, ctx)]))


def _rewrite(graph: ir.Graph, conv: ir.Node, ctx: PassContext) -> bool:
    reason = ctx.excluded(str(conv.name)) or _refusal(conv)
    if reason:
        ctx.missed(str(conv.name), reason)
        return False
    x, weight, shape = conv.inputs[0], const_array(conv.inputs[1]), _static_shape(conv)
    assert x is not None and weight is not None and shape is not None
    pads, sizes = _pads(conv), [_axis(weight.shape[2 + i], shape[2 + i], _pads(conv)[i], _pads(conv)[2 + i]) for i in range(2)]
    packed = _pack(weight, [pads[0] % 2, pads[1] % 2])
    blocks = new_node(graph, "SpaceToDepth", [x], name=f"{conv.name}_blocks", attributes={"blocksize": 2})
    out = blocks.outputs[0]
    out.type, out.shape = x.type, ir.Shape([shape[0], 4 * weight.shape[1], int(shape[2]) // 2, int(shape[3]) // 2])
    insert_after(graph, x, blocks)
    conv.replace_input_with(0, out)
    conv.replace_input_with(1, add_constant(graph, f"{conv.name}_blocked_weight", packed.astype(weight.dtype), x.dtype))
    _set(conv, "strides", [1, 1])
    _set(conv, "kernel_shape", list(packed.shape[2:]))
    _set(conv, "pads", [s[0] for s in sizes] + [s[1] for s in sizes])
    ctx.applied(str(conv.name), f"{weight.shape[1]} channels became {4 * weight.shape[1]}", kernel=int(packed.shape[2]))
    return True


def _refusal(conv: ir.Node) -> str | None:
    weight, shape = const_array(conv.inputs[1]), _static_shape(conv)
    if weight is None or weight.ndim != 4 or shape is None:
        return "its weight is not constant, or the picture's height and width are not known"
    if _ints(conv, "strides", [1, 1]) != [2, 2] or _ints(conv, "dilations", [1, 1]) != [1, 1] or _int(conv, "group", 1) != 1:
        return "not a plain convolution of stride 2"
    if weight.shape[1] > _FEW_CHANNELS or any(int(d) % 2 for d in shape[2:]):
        return f"it has {weight.shape[1]} input channels (at most {_FEW_CHANNELS} gain) or an odd height or width"
    if "auto_pad" in conv.attributes and conv.attributes["auto_pad"].as_string() not in ("", "NOTSET", "VALID"):
        return "auto_pad is not written out"
    pads = _pads(conv)
    if any(_axis(weight.shape[2 + i], shape[2 + i], pads[i], pads[2 + i])[1] < 0 for i in range(2)):
        return "its padding has no counterpart in blocks"
    return None


def _axis(kernel: int, size: int, before: int, after: int) -> tuple[int, int]:
    """Padding in blocks before and after one axis, so that the output keeps its length."""
    length = (size + before + after - kernel) // 2 + 1
    start = (before + before % 2) // 2
    blocks = -(-(kernel + before % 2) // 2)
    return start, length - 1 - size // 2 - start + blocks


def _pack(weight: NDArray[np.generic], shift: list[int]) -> NDArray[np.generic]:
    """[O, C, K, L] -> [O, 4C, K', L'] in SpaceToDepth's channel order (row in block, column in block, channel)."""
    o, c, k, m = weight.shape
    rows, columns = -(-(k + shift[0]) // 2), -(-(m + shift[1]) // 2)
    wide = np.zeros((o, c, 2 * rows, 2 * columns), weight.dtype)
    wide[:, :, shift[0] : shift[0] + k, shift[1] : shift[1] + m] = weight
    return wide.reshape(o, c, rows, 2, columns, 2).transpose(0, 3, 5, 1, 2, 4).reshape(o, 4 * c, rows, columns)


def _static_shape(conv: ir.Node) -> list[int] | None:
    """[N, C, H, W] of the input with known H and W; N is whatever it is."""
    value = conv.inputs[0]
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    dims = [d if isinstance(d, int) else d for d in value.shape]
    return dims if all(isinstance(d, int) for d in dims[2:]) else None  # type: ignore[return-value]


def _pads(conv: ir.Node) -> list[int]:
    return _ints(conv, "pads", [0, 0, 0, 0])


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    return list(node.attributes[name].as_ints()) if name in node.attributes else default


def _int(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _set(node: ir.Node, name: str, values: list[int]) -> None:
    node.attributes[name] = ir.AttrInt64s(name, values)
