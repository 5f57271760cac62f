"""Rules of ONNX Runtime's CPU provider (1.31; pairings measured with `tools/probe_int8.py`)."""

from __future__ import annotations

from onnx import NodeProto

from qcompile.target import fix_graph as graph
from qcompile.target import rules_common as common
from qcompile.target.findings import Context, Hits, Operand, Rule, error, warning

LAST_GOOD_OPSET = 20


def int8_matmul_add(c: Context) -> Hits:
    """From opset 21 on, ORT 1.31 turns an int8 MatMul of fixed 3-D shape + constant Add into a Gemm with a uint8 zero point.

    Measured over 576 forms: fails exactly when the activation is int8 with an explicit zero point and every axis is fixed.
    """
    if c.view.opset() <= LAST_GOOD_OPSET:
        return
    for site in c.sites:
        if site.node.op_type == "MatMul" and site.weight is not None and any(_signed_static(c, o) for o in site.activations):
            bias = next((n for n, slot in c.view.consumers.get(site.node.output[0], []) if _constant_add(c, n, slot)), None)
            if bias is not None:
                yield (
                    site.node.name,
                    f"ONNX Runtime 1.31 fuses this MatMul and {bias.name} wrongly (opset {c.view.opset()}) and fails to load",
                )


def _signed_static(c: Context, operand: Operand) -> bool:
    name = operand.dq.output[0]
    explicit = len(operand.dq.input) > 2 and bool(operand.dq.input[2])
    return operand.type_name == "int8" and explicit and name in c.view.static_names and c.view.ranks.get(name, 0) >= 3


def _constant_add(c: Context, node: NodeProto, slot: int) -> bool:
    return node.op_type == "Add" and c.view.is_constant(node.input[1 - slot])


def slow_pairing(c: Context) -> Hits:
    """int8 activations with uint8 weights have no integer kernel."""
    for site in c.sites:
        kinds = [(o.type_name, o.constant) for o in site.operands]
        if ("int8", False) in kinds and ("uint8", True) in kinds:
            yield site.node.name, "int8 activations with uint8 weights have no integer kernel, so this runs in float"


def simulated_codes(c: Context) -> Hits:
    """16-bit and fp8 codes are dequantized in front of a float kernel."""
    integer = {"int8", "uint8", "int4", "uint4", "int32"}
    for node in c.quantizers:
        kind = c.code_type(node)
        if node.op_type == "DequantizeLinear" and kind is not None and kind not in integer:
            yield node.name, f"{kind} codes are simulated: ONNX Runtime dequantizes them and computes in float"


ORT_RULES: tuple[Rule, ...] = (
    error("QC-ORT-001", common.opset_too_high, "opset", "convert to opset 26 or lower"),
    error(
        "QC-ORT-009",
        common.opset_too_low,
        "opset",
        "convert it with onnx.version_converter (the `opset` pass does)",
        repair=graph.raise_opset,
    ),
    error("QC-ORT-002", int8_matmul_add, "int8 MatMul and Add", "export at opset 20 or lower"),
    warning("QC-ORT-003", slow_pairing, "operand pairing", "use uint8 activations with int8 weights"),
    warning("QC-ORT-004", common.scale_not_constant, "scale not constant", "store the scale as an initializer"),
    error("QC-ORT-005", common.scale_not_positive, "scale value", "calibrate again with data that reaches this tensor"),
    error("QC-ORT-010", common.scale_not_finite, "scale not finite", "calibrate again; look for Inf or NaN in the data"),
    warning("QC-ORT-006", common.wrong_weight_axis, "weight axis", "put the weight's scales on the output-channel axis"),
    warning("QC-ORT-007", common.per_channel_activation, "per-channel activation", "use one scale per activation tensor"),
    warning("QC-ORT-008", simulated_codes, "simulated type", "compile again with --target ort"),
)
