"""Rules of OpenVINO's CPU plugin (2026.4; each form was read back with `get_runtime_model()`)."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from qcompile.target import fix_graph as graph
from qcompile.target import rules_common as common
from qcompile.target.findings import Context, Hits, Rule, error, warning


def asymmetric_weight(c: Context) -> Hits:
    """A weight in uint8, or with a zero point: the layer is computed in float."""
    for site in c.sites:
        weight = site.weight
        if weight is not None and (weight.type_name == "uint8" or _moved(c, weight.dq)):
            yield site.node.name, "its weight is unsigned or has a zero point, so it is computed in float"


def _moved(c: Context, dq: NodeProto) -> bool:
    names = list(dq.input)
    zero = c.view.constant(names[2]) if len(names) > 2 and names[2] else None
    return zero is not None and bool(np.any(zero.astype(np.float32) != 0))


def unsigned_queries(c: Context) -> Hits:
    """A product of two activations with a zero point is computed in float."""
    for site in c.sites:
        if site.node.op_type == "MatMul" and not site.constant_weight and any(_moved(c, o.dq) for o in site.activations):
            yield site.node.name, "an operand has a zero point, so this product of activations is computed in float"


def one_operand_only(c: Context) -> Hits:
    """A weighted layer whose activation is quantized and whose weight is not."""
    for site in c.sites:
        if site.constant_weight and site.activations and site.weight is None:
            yield site.node.name, "its weight is float, so it is computed in float"


OPENVINO_RULES: tuple[Rule, ...] = (
    error("QC-OV-001", asymmetric_weight, "weight zero point", "quantize weights to int8 with zero point 0", "float"),
    error("QC-OV-002", unsigned_queries, "attention zero point", "quantize both operands to int8 with zero point 0", "float"),
    error("QC-OV-003", one_operand_only, "float weight", "quantize the weight too, or neither", "float"),
    warning("QC-OV-004", common.wrong_weight_axis, "weight axis", "put the weight's scales on the output-channel axis"),
    warning("QC-OV-005", common.per_channel_activation, "per-channel activation", "use one scale per activation tensor"),
    warning("QC-OV-006", common.scale_not_constant, "scale not constant", "store the scale as an initializer"),
    error("QC-OV-007", common.scale_not_positive, "scale value", "calibrate again with data that reaches this tensor"),
    error("QC-OV-008", common.scale_not_finite, "scale not finite", "calibrate again; look for Inf or NaN in the data"),
    error("QC-OV-009", common.opset_too_high, "opset", "convert to opset 26 or lower"),
    error(
        "QC-OV-010",
        common.opset_too_low,
        "opset",
        "convert it with onnx.version_converter (the `opset` pass does)",
        repair=graph.raise_opset,
    ),
)
