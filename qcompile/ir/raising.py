"""The opset of a model raised by onnx's converter, never by the bare number."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx import version_converter

from qcompile.errors import ModelError
from qcompile.ir.model import Model
from qcompile.ir.notes import carry_notes

_SMALL = 1 << 16
_SCAN_BATCHED = 8


def raise_opset(model: Model, wanted: int) -> None:
    """Convert `model`, in place, to the opset `wanted`; notes and names of nodes stay.

    Raises:
        ModelError: the converter knows no way.
    """
    big = {
        n: v.const_value
        for n, v in model.graph.initializers.items()
        if v.const_value is not None and v.const_value.nbytes > _SMALL
    }
    nodes = {n.name: n for n in model.graph}
    model.ir = _convert(model, list(big), wanted)
    _restore(model, big, nodes)
    model.name_nodes()


def _convert(model: Model, big: Sequence[str], wanted: int) -> ir.Model:
    """Convert without the large weights: they travel as graph inputs."""
    if wanted > _SCAN_BATCHED >= model.opset and any(n.op_type == "Scan" and not n.domain for n in model.graph.all_nodes()):
        raise ModelError("Scan of opset 8 has a batch axis that later ones lack and cannot be raised; export at opset 9 or later")
    slim = model.clone()
    for name in big:
        value = slim.graph.initializers.pop(name)
        value.const_value = None
        slim.graph.inputs.append(value)
    proto = ir.to_proto(slim.ir)
    try:
        converted = version_converter.convert_version(proto, wanted)
        onnx.checker.check_model(_shaped(converted))
    except Exception as e:
        raise ModelError(
            f"cannot raise opset {model.opset} to {wanted}: {_last_line(e)}; export the model at opset {wanted}"
        ) from e
    result = ir.from_proto(converted)
    result.metadata_props.update(model.metadata)
    return result


def _shaped(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for the checker, which wants a shape on every input and output; ONNX Runtime does not."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for value in (*copy.graph.input, *copy.graph.output):
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.SetInParent()
    return copy


def _restore(model: Model, big: dict[str, ir.TensorProtocol], nodes: dict[str | None, ir.Node]) -> None:
    for value in [v for v in model.graph.inputs if v.name in big]:
        model.graph.inputs.remove(value)
        value.const_value = big[str(value.name)]
        model.graph.register_initializer(value)
    for node in model.graph:
        if node.name in nodes:
            carry_notes(nodes[node.name], node)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
