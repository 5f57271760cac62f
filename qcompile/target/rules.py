"""The rule checker: will this Q/DQ graph build, and will it run in the precision that it promises?

Every rule has a stable id.  An *error* is refused by the backend or silently runs in float; a *warning* costs speed
or accuracy.  `python -m pytest tests/backend` builds a tiny model for each TensorRT rule and compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from qcompile.errors import UsageError
from qcompile.target import rules_common as common
from qcompile.target import rules_ort as ort
from qcompile.target import rules_trt as trt
from qcompile.target.catalog import TARGETS
from qcompile.target.findings import Check, Context, Finding, Rule
from qcompile.target.view import GraphView

_ORT_FIX = "compile again with --target ort"


def _error(rule: str, check: Check, title: str, fix: str) -> Rule:
    return Rule(rule, title, "error", fix, check)


def _warning(rule: str, check: Check, title: str, fix: str) -> Rule:
    return Rule(rule, title, "warning", fix, check)


TRT_RULES: tuple[Rule, ...] = (
    _error("QC-TRT-001", trt.zero_point_not_zero, "zero point", "quantize symmetrically (zero point 0)"),
    _error("QC-TRT-002", trt.unsupported_codes, "code type", "use int8, float8e4m3fn or int4 weights"),
    _error("QC-TRT-003", common.int32_bias, "int32 bias", "store the bias as a float initializer of the compute type"),
    _error("QC-TRT-004", common.scale_not_constant, "scale not constant", "store the scale as an initializer"),
    _error("QC-TRT-005", common.scale_not_positive, "scale value", "calibrate again with data that reaches this tensor"),
    _warning("QC-TRT-006", trt.scale_type, "scale type", "store the scale in the type of the network's body (float16)"),
    _error("QC-TRT-007", common.wrong_weight_axis, "weight axis", "put the weight's scales on the output-channel axis"),
    _error("QC-TRT-008", common.per_channel_activation, "per-channel activation", "use one scale per activation tensor"),
    _error("QC-TRT-009", trt.one_operand_only, "one operand", "quantize the weight (or other operand) too, or neither"),
    _error("QC-TRT-010", trt.operand_types_differ, "operand types", "quantize both operands to the same type"),
    _warning(
        "QC-TRT-011", common.unequal_quantizers, "one tensor, one quantizer", "share one QuantizeLinear between the consumers"
    ),
    _warning("QC-TRT-012", trt.quantized_scores, "quantized scores", "remove the Q/DQ between the scores MatMul and the softmax"),
    _warning("QC-TRT-013", trt.partial_attention, "partly quantized attention", "quantize q, k, softmax output and v, or none"),
    _error(
        "QC-TRT-014", trt.unsupported_op, "unsupported operator", "compile with --target trt (integer operators cannot be built)"
    ),
    _error("QC-TRT-015", trt.contrib_domain, "foreign domain", "replace the operator, or provide a plugin and a surgery pass"),
    _warning("QC-TRT-016", common.bad_names, "node names", "give every node a unique name (`canonicalize` does)"),
    _error("QC-TRT-017", common.opset_too_low, "opset", "convert it with onnx.version_converter (the `opset` pass does)"),
    _warning("QC-TRT-018", trt.packed_qkv, "packed q/k/v", "split the projection in three (the builder merges them again)"),
    _warning("QC-TRT-019", trt.deconvolution, "deconvolution", "leave ConvTranspose in float"),
    _warning("QC-TRT-020", trt.float32_rest, "float32 rest", "cast the float rest to float16 (the `fp16` pass does)"),
    _error("QC-TRT-021", trt.gpu_types, "gpu", "choose another --gpu or another scheme"),
    _warning("QC-TRT-022", trt.weight_only_int8, "weight only", "quantize the activation too, or use blocked int4 weights"),
    _warning("QC-TRT-023", trt.unblocked_int4, "block size", "give int4 weights blocks of 64 or 128 along the reduction axis"),
    _error("QC-TRT-024", trt.constant_codes, "constant codes", "put the DequantizeLinear directly behind the constant"),
    _warning("QC-TRT-025", trt.softmax_scale, "softmax scale", "use 1/127 (int8) or 1/448 (fp8)"),
    _warning("QC-TRT-026", common.opset_too_high, "opset", "convert to opset 25 or lower"),
)

ORT_RULES: tuple[Rule, ...] = (
    _error("QC-ORT-001", common.opset_too_high, "opset", "convert to opset 26 or lower"),
    _error("QC-ORT-009", common.opset_too_low, "opset", "convert it with onnx.version_converter (the `opset` pass does)"),
    _error("QC-ORT-002", ort.int8_matmul_add, "int8 MatMul and Add", "export at opset 20 or lower"),
    _warning("QC-ORT-003", ort.slow_pairing, "operand pairing", "use uint8 activations with int8 weights"),
    _warning("QC-ORT-004", common.scale_not_constant, "scale not constant", "store the scale as an initializer"),
    _error("QC-ORT-005", common.scale_not_positive, "scale value", "calibrate again with data that reaches this tensor"),
    _warning("QC-ORT-006", common.wrong_weight_axis, "weight axis", "put the weight's scales on the output-channel axis"),
    _warning("QC-ORT-007", common.per_channel_activation, "per-channel activation", "use one scale per activation tensor"),
    _warning("QC-ORT-008", ort.simulated_codes, "simulated type", _ORT_FIX),
)

RULES: dict[str, tuple[Rule, ...]] = {"trt": TRT_RULES, "rtx": TRT_RULES, "ort": ORT_RULES}


def check(model: onnx.ModelProto | str | Path, target: str, gpus: Sequence[str] = ()) -> list[Finding]:
    """Findings of all rules of `target` on a model or file, errors first, in rule order.

    `gpus` (names like "sm89") adds the capability rules.

    Raises:
        UsageError: no such target.
        ModelError: the file is not an ONNX model, or its external data is missing.
    """
    if target not in RULES:
        raise UsageError(f"target {target!r} has no rules; use one of {', '.join(RULES)}")
    context = Context(GraphView.open(model), TARGETS[target], tuple(gpus))
    found = [finding for rule in RULES[target] for finding in rule.findings(context)]
    return sorted(found, key=lambda f: f.severity == "warning")
