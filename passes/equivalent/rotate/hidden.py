"""r4: the hidden layer of an MLP, while it runs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.ir.edit import add_constant, insert_after, new_node, redirect
from qcompile.ir.model import Model
from qcompile.ir.notes import keep_float
from qcompile.passes.equivalent.rotate.rows import F64, moment, rows_of
from qcompile.pipeline.base import PassContext
from qcompile.quant.hadamard import block_order, klt_rotation, rotation
from qcompile.rewrite.linear import map_inputs
from qcompile.structure import Linear, Mlp, find_mlps

_BLOCK = 128


def rotate_hidden(model: Model, klt: bool, ctx: PassContext, rng: np.random.Generator) -> bool:
    """Rotate the hidden layer of every MLP that allows it, remark on the others; whether any was changed."""
    matches, done = find_mlps(model.graph), False
    for refusal in matches.refused:
        ctx.remarks.missed(str(refusal.node.name), f"hidden layer not rotated: {refusal.reason}")
    for mlp in matches:
        block = block_order(mlp.fc2.in_channels, _BLOCK)
        reason = ctx.selection.excluded(mlp.fc2.node) or _hidden_refusal(mlp, block)
        if reason:
            ctx.remarks.missed(str(mlp.fc2.node.name), f"hidden layer not rotated: {reason}")
            continue
        rows = rows_of(mlp.fc2.input, ctx) if klt else None
        r = rotation(block, rng, block) if rows is None else klt_rotation(moment(rows.reshape(-1, block)), rng)
        _rotate_online(model.graph, mlp.fc2, r)
        ctx.remarks.applied(str(mlp.fc2.node.name), f"hidden layer rotated in blocks of {block}", block=block)
        done = True
    return done


def _hidden_refusal(mlp: Mlp, block: int) -> str | None:
    if mlp.fc2.channel_axis != -1:
        return "it is a convolution"
    if block < 16:
        return f"no Hadamard block of 16 or more divides its {mlp.fc2.in_channels} channels"
    return "its rank is unknown: run canonicalize" if mlp.fc2.input.shape is None else None


def _rotate_online(graph: ir.Graph, linear: Linear, r: F64) -> None:
    """Reshape [.., n/b, b] -> MatMul [b, b] -> Reshape back in front of `linear`, whose weight takes the inverse."""
    value, blocks = linear.input, linear.in_channels // len(r)
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    rank = len(value.shape or ())
    split = add_constant(graph, f"{value.name}_blocks", np.array([0] * (rank - 1) + [blocks, len(r)], np.int64))
    joined = add_constant(graph, f"{value.name}_joined", np.array([0] * (rank - 1) + [-1], np.int64))
    matrix = add_constant(graph, f"{value.name}_rotation", r.astype(dtype))
    cut = new_node(graph, "Reshape", [value, split], name=f"{linear.node.name}_blocks")
    product = new_node(graph, "MatMul", [cut.outputs[0], matrix], name=f"{linear.node.name}_rotation")
    back = new_node(graph, "Reshape", [product.outputs[0], joined], name=f"{linear.node.name}_joined", like=value)
    for out in (cut.outputs[0], product.outputs[0]):
        out.type = value.type
        out.shape = ir.Shape([*list(value.shape or ())[:-1], blocks, len(r)])
    keep_float(product, "an online rotation")
    insert_after(graph, value, cut, product, back)
    redirect(value, back.outputs[0], [(linear.node, linear.input_slot)])
    exact = r.astype(dtype).astype(np.float64)
    inverse: F64 = np.asarray(np.linalg.inv(exact), np.float64)
    map_inputs(linear, np.kron(np.eye(blocks), inverse).astype(np.float64))
