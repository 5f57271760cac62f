"""The rules of TensorRT; `python -m pytest tests/backend tests/target` builds tiny models for each and compares."""

from __future__ import annotations

from qcompile.target import fix_graph as graph
from qcompile.target import fix_scales as scales
from qcompile.target import rules_common as common
from qcompile.target.findings import Rule, error, warning
from qcompile.target.tensorrt import checks as trt
from qcompile.target.tensorrt import gpu, shapes, types

TRT_RULES: tuple[Rule, ...] = (
    error(
        "QC-TRT-001",
        trt.zero_point_not_zero,
        "zero point",
        "quantize symmetrically (zero point 0)",
        "refused",
        repair=scales.symmetric_int8,
    ),
    error(
        "QC-TRT-002",
        trt.unsupported_codes,
        "code type",
        "use int8, float8e4m3fn or int4 weights",
        "refused",
        repair=scales.symmetric_int8,
    ),
    error(
        "QC-TRT-003",
        common.int32_bias,
        "int32 bias",
        "store the bias as a float initializer of the compute type",
        "refused",
        repair=scales.int32_bias_to_float,
    ),
    error("QC-TRT-004", common.scale_not_constant, "scale not constant", "store the scale as an initializer", "refused"),
    error(
        "QC-TRT-005", common.scale_not_positive, "scale value", "calibrate again with data that reaches this tensor", "refused"
    ),
    warning(
        "QC-TRT-006",
        trt.scale_type,
        "scale type",
        "store the scale in the type of the network's body (float16)",
        repair=scales.scales_to_body_type,
    ),
    error(
        "QC-TRT-007",
        common.wrong_weight_axis,
        "weight axis",
        "put the weight's scales on the output-channel axis",
        "float",
        repair=scales.weights_along_outputs,
    ),
    error(
        "QC-TRT-008",
        trt.per_channel_activation,
        "per-channel activation",
        "use one scale per activation tensor",
        "float",
        repair=scales.one_activation_scale,
    ),
    error(
        "QC-TRT-009",
        trt.one_operand_only,
        "one operand",
        "quantize the weight (or other operand) too, or neither",
        "float",
        repair=graph.drop_single_operands,
    ),
    error("QC-TRT-010", trt.operand_types_differ, "operand types", "quantize both operands to the same type", "refused"),
    warning(
        "QC-TRT-011", common.unequal_quantizers, "one tensor, one quantizer", "share one QuantizeLinear between the consumers"
    ),
    warning(
        "QC-TRT-012",
        trt.quantized_scores,
        "quantized scores",
        "remove the Q/DQ between the scores MatMul and the softmax",
        repair=graph.drop_scores,
    ),
    warning(
        "QC-TRT-013",
        trt.partial_attention,
        "partly quantized attention",
        "quantize q, k, softmax output and v, or none",
        repair=graph.drop_partial_attention,
    ),
    error(
        "QC-TRT-014",
        trt.unsupported_op,
        "unsupported operator",
        "compile with --target trt (integer operators cannot be built)",
        "refused",
    ),
    error(
        "QC-TRT-015",
        trt.contrib_domain,
        "foreign domain",
        "replace the operator, or provide a plugin and a surgery pass",
        "refused",
    ),
    warning(
        "QC-TRT-016",
        common.bad_names,
        "node names",
        "give every node a unique name (`canonicalize` does)",
        repair=graph.unique_names,
    ),
    warning(
        "QC-TRT-017",
        common.opset_too_low,
        "opset",
        "convert it with onnx.version_converter (the `opset` pass does)",
        repair=graph.raise_opset,
    ),
    warning(
        "QC-TRT-018", trt.packed_qkv, "packed q/k/v", "split the projection in three (the builder merges them again)", "float"
    ),
    warning(
        "QC-TRT-019",
        trt.deconvolution,
        "deconvolution",
        "leave ConvTranspose in float",
        "float",
        repair=graph.drop_deconvolutions,
    ),
    warning("QC-TRT-020", trt.float32_rest, "float32 rest", "cast the float rest to float16 (the `fp16` pass does)"),
    error("QC-TRT-021", gpu.gpu_types, "gpu", "choose another --gpu or another scheme", "refused", before_build=True),
    warning(
        "QC-TRT-022", trt.weight_only_int8, "weight only", "quantize the activation too, or use blocked int4 weights", "float"
    ),
    warning(
        "QC-TRT-023", trt.unblocked_int4, "block size", "give int4 weights blocks of 64 or 128 along the reduction axis", "float"
    ),
    error("QC-TRT-024", trt.constant_codes, "constant codes", "put the DequantizeLinear directly behind the constant", "refused"),
    warning("QC-TRT-025", trt.softmax_scale, "softmax scale", "use 1/127 (int8) or 1/448 (fp8)", repair=scales.softmax_scales),
    warning("QC-TRT-026", common.opset_too_high, "opset", "convert to opset 25 or lower"),
    error(
        "QC-TRT-027",
        shapes.blocked_weight_and_activation,
        "blocked weight and activation",
        "use per-channel weight scales, or leave the activation in float",
        "wrong",
    ),
    error(
        "QC-TRT-028",
        shapes.bad_blocks,
        "block shape",
        "choose a block size that divides one of the weight's last two axes",
        "refused",
    ),
    warning("QC-TRT-029", shapes.mxfp8_float, "mxfp8", "use fp8 (or nvfp4) for TensorRT-RTX", "float"),
    error(
        "QC-TRT-030",
        types.mixed_types,
        "mixed float types",
        "store scales and biases in the type of the network's body",
        "refused",
    ),
    warning(
        "QC-TRT-031",
        trt.per_row_activation,
        "per-row activation",
        "use one scale per activation tensor",
        repair=scales.one_activation_scale,
    ),
    error(
        "QC-TRT-032",
        shapes.unequal_concat,
        "concat scales",
        "give all inputs of the Concat one scale, or quantize behind it",
        "float",
        repair=scales.equal_concat_scales,
    ),
    warning(
        "QC-TRT-033",
        shapes.large_fp8_kernel,
        "large fp8 kernel",
        "leave this convolution in float, or use int8",
        "float",
        repair=graph.drop_large_kernels,
    ),
    error(
        "QC-TRT-034",
        gpu.turing_convolution,
        "convolution on sm75",
        "choose a newer --gpu, or leave convolutions in float",
        "float",
    ),
    warning("QC-TRT-035", trt.int4_activation, "int4 activation", "use int8 activations, or leave them in float"),
    error(
        "QC-TRT-036", shapes.fp4_form, "fp4 weight", "use blocks of 16 along the reduction axis, and 32 values or more", "float"
    ),
    error(
        "QC-TRT-037", shapes.fp4_activation_form, "fp4 activation", "use blocks of 16 along an axis that they divide", "refused"
    ),
    error(
        "QC-TRT-038", shapes.one_element_scale, "scale shape", "store the scale as a scalar", "float", repair=scales.scalar_scales
    ),
    warning(
        "QC-TRT-039", shapes.one_block, "single block", "choose blocks of 64 or 128, smaller than the reduction axis", "float"
    ),
    warning(
        "QC-TRT-040",
        common.duplicate_quantizers,
        "duplicate quantizers",
        "share one QuantizeLinear between the consumers",
        repair=graph.merge_quantizers,
    ),
    error(
        "QC-TRT-041",
        trt.uint8_activation,
        "uint8 activation",
        "quantize symmetrically to int8",
        "wrong",
        repair=scales.symmetric_int8,
    ),
    error("QC-TRT-042", common.scale_not_finite, "scale not finite", "calibrate again; look for Inf or NaN in the data", "wrong"),
    error("QC-TRT-043", shapes.other_blocks, "blocks cut differently", "choose a block size that divides the axis", "wrong"),
    error(
        "QC-TRT-044",
        shapes.one_element_weight_scale,
        "weight scale shape",
        "store the scale as a scalar",
        "refused",
        repair=scales.scalar_scales,
    ),
    error(
        "QC-TRT-045",
        gpu.turing_float_gemm,
        "float32 GEMM on sm75",
        "cast the network to float16 (the `fp16` pass does), or choose a newer --gpu",
        "refused",
    ),
    error("QC-TRT-046", gpu.bfloat16_deconvolution, "bfloat16 deconvolution", "use float16 or float32 here", "refused"),
    error("QC-TRT-047", shapes.odd_int4, "odd int4 weight", "use int8 for this weight, or pad it", "refused"),
    error("QC-TRT-048", trt.float_zero_point, "fp8 zero point", "leave the zero point out, or make it 0", "wrong"),
)
