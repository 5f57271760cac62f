"""Rules of TensorRT about blocks of scales, kernel sizes and joined tensors (measured with TensorRT-RTX 1.7.1)."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from onnx import NodeProto

from qcompile.target.findings import Context, Hits, Operand, Site, scale_of
from qcompile.target.view import DEQUANTIZE_OPS

FP8_KERNEL_AREA = 32
FP4_BLOCK = 16


def blocked_weight_and_activation(c: Context) -> Hits:
    """Blocked int8, int4 or fp8 weights against a quantized activation: the scales are applied behind the GEMM.

    There they are read as one scale per output column (a multiplication by [blocks x N] numbers behind a GEMM of N
    columns stands in the kernel dump), so the numbers are wrong and nothing says so.
    """
    for site in c.sites:
        weight = site.weight
        if weight is None or weight.dq.op_type != "DequantizeLinear" or weight.type_name == "float4e2m1":
            continue
        if weight.block and len(site.operands) == 2:
            yield site.node.name, "the weight has blocks and the activation is quantized: the engine multiplies with wrong scales"


def bad_blocks(c: Context) -> Hits:
    """A blocked axis that cannot be cut into that many equal blocks, or is not one of the last two axes."""
    for node in c.quantizers:
        dims, axis, block = _blocking(c, node)
        if block and dims[axis] % -(-dims[axis] // block):
            yield node.name, f"axis {axis} of {dims} is not a whole number of blocks of {block}"
        if block and axis < len(dims) - 2:
            yield node.name, f"the blocks run along axis {axis} of {dims}; they must run along one of the last two"


def other_blocks(c: Context) -> Hits:
    """Blocks that do not divide their axis, which the builder cuts into equal blocks of another size: wrong scales."""
    for node in c.quantizers:
        dims, axis, block = _blocking(c, node)
        count = -(-dims[axis] // block) if block else 1
        if block and count > 1 and dims[axis] % block and dims[axis] % count == 0:
            yield node.name, f"axis {axis} of {dims} in blocks of {block}: the builder cuts blocks of {dims[axis] // count}"


def odd_int4(c: Context) -> Hits:
    """4-bit codes are packed in pairs: an odd number of them is refused."""
    for node in c.quantizers:
        count = prod(c.view.dims.get(node.input[0], (0,)))
        if c.code_type(node) in ("int4", "float4e2m1") and count % 2:
            yield node.name, f"{count} codes of {c.code_type(node)}: an odd number cannot be packed in pairs"


def _blocking(c: Context, node: NodeProto) -> tuple[list[int], int, int]:
    """(shape of the codes, blocked axis, block size); block size 0 where there are none or the shape is unknown."""
    block = next((int(a.i) for a in node.attribute if a.name == "block_size"), 0)
    proto = c.view.constant_proto(node.input[0])
    if not block or proto is None:
        return [], 0, 0
    axis = next((int(a.i) for a in node.attribute if a.name == "axis"), 1)
    return list(proto.dims), axis % len(proto.dims), block


def one_block(c: Context) -> Hits:
    """A weight-only int4 weight with a single block along its axis is dequantized outside the GEMM, as without blocks."""
    for site in c.sites:
        weight = site.weight
        if weight is None or site.activations or weight.type_name != "int4":
            continue
        dims, axis, block = _blocking(c, weight.dq)
        if block and dims[axis] <= block:
            yield site.node.name, f"the weight is one block of {block}: it is dequantized outside the GEMM"


def fp4_form(c: Context) -> Hits:
    """NVFP4: blocks of 16 along the reduction axis, at least two of them."""
    for site, weight in _fp4(c):
        reduction = site.reduction_axis(weight)
        if weight.block != FP4_BLOCK:
            yield site.node.name, f"fp4 codes have blocks of {weight.block or 'no size'}; NVFP4 has {FP4_BLOCK}"
        elif reduction is not None and weight.axis_here not in (None, reduction):
            yield site.node.name, "the fp4 weight's blocks do not run along the reduction axis: a float GEMM"
        elif 0 < _length(c, weight) < 2 * FP4_BLOCK:
            yield site.node.name, f"a reduction over fewer than {2 * FP4_BLOCK} values has no fp4 kernel: a float GEMM"


def _fp4(c: Context) -> Iterator[tuple[Site, Operand]]:
    return ((s, s.weight) for s in c.sites if s.weight is not None and s.weight.type_name == "float4e2m1")


def _length(c: Context, operand: Operand) -> int:
    dims, axis, block = _blocking(c, operand.dq)
    return dims[axis] if block else 0


def fp4_activation_form(c: Context) -> Hits:
    """trt::TRT_FP4DynamicQuantize knows blocks of 16 that divide the axis."""
    for node in c.view.nodes:
        if node.op_type == "TRT_FP4DynamicQuantize":
            block = next((int(a.i) for a in node.attribute if a.name == "block_size"), FP4_BLOCK)
            size = (*c.view.dims.get(node.input[0], ()), 0)[-2]
            if block != FP4_BLOCK or size % FP4_BLOCK:
                yield (
                    node.name,
                    f"blocks of {block} over {size or '?'} values; fp4 needs blocks of {FP4_BLOCK} that divide the axis",
                )


def mxfp8_float(c: Context) -> Hits:
    """MXFP8 operands parse and build, but TensorRT-RTX 1.7 multiplies them in float."""
    for site in c.sites:
        if any(o.dq.op_type == "TRT_MXFP8DequantizeLinear" for o in site.operands):
            yield site.node.name, "the operands are MXFP8: TensorRT-RTX 1.7 dequantizes them in front of a float GEMM"


def large_fp8_kernel(c: Context) -> Hits:
    """An fp8 convolution with more than 32 taps compiles to a float kernel (measured: 4x8 and 1x32 fp8, 6x6 and 1x33 float)."""
    for site in c.sites:
        proto = c.view.constant_proto(site.weight.dq.input[0]) if site.weight is not None else None
        taps = prod(proto.dims[2:]) if proto is not None else 0
        fp8 = len(site.operands) == 2 and all(o.type_name == "float8e4m3fn" for o in site.operands)
        if site.node.op_type == "Conv" and fp8 and taps > FP8_KERNEL_AREA:
            yield site.node.name, f"an fp8 convolution with {taps} taps runs in float: kernels end at {FP8_KERNEL_AREA}"


def one_element_scale(c: Context) -> Hits:
    """The scale of a convolution's activation is a list of one number instead of a number: a float kernel."""
    for site, operand in _one_scale(c):
        if not operand.constant:
            yield site.node.name, f"the scale of the activation ({operand.dq.name}) is a list of one number, not a scalar"


def one_element_weight_scale(c: Context) -> Hits:
    """The scale of a convolution's weight is a list of one number, but the weight has several output channels."""
    for site, operand in _one_scale(c):
        if operand.constant and not _one_channel(c, operand):
            yield site.node.name, f"the scale of the weight ({operand.dq.name}) is a list of one number, not a scalar"


def _one_scale(c: Context) -> Iterator[tuple[Site, Operand]]:
    sites = (s for s in c.sites if s.node.op_type == "Conv")
    return ((s, o) for s in sites for o in s.operands if o.one_scale)


def _one_channel(c: Context, operand: Operand) -> bool:
    """Whether the weight really has one output channel."""
    proto = c.view.constant_proto(operand.dq.input[0])
    return proto is not None and proto.dims[0] == 1


def unequal_concat(c: Context) -> Hits:
    """A GEMM or convolution reads a Concat of dequantized tensors with unequal scales: it runs in float."""
    for site in c.sites:
        for name in site.node.input[:2]:
            joined = c.view.producer.get(c.view.origin(name))
            if joined is None or joined.op_type != "Concat" or c.view.dequantizer(name) is None:
                continue
            if len({_scale_bytes(c, x) for x in joined.input}) > 1:
                yield site.node.name, f"{joined.name} joins tensors with unequal scales, so this runs in float"


def _scale_bytes(c: Context, name: str) -> bytes:
    dq = c.view.dequantizer(name)
    scale = scale_of(c.view, dq) if dq is not None and dq.op_type in DEQUANTIZE_OPS else None
    return b"" if scale is None else scale.tobytes()
