"""The rule checker on tiny graphs: one row of the behaviour matrix at a time (no TensorRT needed)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.errors import ModelError, UsageError
from qcompile.target.catalog import TARGETS
from qcompile.target.check import check
from qcompile.target.tensorrt.accepted import ACCEPTED
from tests.target import formats
from tests.target.graphs import AttentionForm, Form, attention, single
from tests.target.matrix import ATTENTION, SINGLE

CONV, MATMUL = Form(), Form(op="MatMul")


def rules(model: onnx.ModelProto, target: str = "rtx", gpus: tuple[str, ...] = ("sm89",)) -> set[str]:
    return {f.rule for f in check(model, target, gpus)}


@pytest.mark.parametrize("row", SINGLE, ids=lambda r: r.name)
def test_operator_rows(row) -> None:
    assert rules(row.model(), gpus=(row.gpu,)) == row.rules


@pytest.mark.parametrize("row", ATTENTION, ids=lambda r: r.name)
def test_attention_rows(row) -> None:
    assert rules(attention(row.form)) == row.rules


def test_accepted_forms_are_rows_without_errors() -> None:
    rows = {r.name: r for r in SINGLE}
    runs_as = {
        "int8": ("low", "int8"),
        "fp8": ("low", "float8e4m3fn"),
        "fp4": ("low", "float4e2m1"),
        "packed int4": ("packed", "int8"),
    }
    for a in ACCEPTED:
        row = rows[a.name]
        assert (row.outcome, row.low) == runs_as[a.outcome]
        assert not [f for f in check(row.model(), "rtx", [row.gpu]) if f.severity == "error"]


def test_ids_are_unique_and_fixes_are_given() -> None:
    for table in (t.rules for t in TARGETS.values()):
        assert len({r.id for r in table}) == len(table)
        assert all(r.fix and r.title and r.check.__doc__ for r in table)


def test_errors_come_first_and_findings_are_json() -> None:
    found = check(single(CONV.but(zero_point=3, scale_type=TensorProto.FLOAT)), "trt")
    assert [f.severity for f in found] == sorted(f.severity for f in found)
    assert set(found[0].to_json()) == {"rule", "severity", "node", "message", "fix"}


def test_gpu_mask() -> None:
    fp8 = single(MATMUL.but(activation="float8e4m3fn", weight="float8e4m3fn"))
    assert rules(fp8, gpus=("sm86",)) == {"QC-TRT-021"}
    assert rules(fp8, gpus=("sm89", "sm120")) == set()
    assert rules(single(CONV), gpus=("sm90",)) == {"QC-TRT-021"}
    assert rules(single(CONV), "trt", gpus=("sm90",)) == set()


def test_two_quantizers_on_one_tensor() -> None:
    model = single(CONV)
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.float16(0.2), "s_other"))
    graph.node.append(helper.make_node("QuantizeLinear", ["x", "s_other", "x_z"], ["other"], name="n_other"))
    assert rules(model) == {"QC-TRT-011"}


def test_names() -> None:
    model = single(CONV)
    model.graph.node[0].name = ""
    model.graph.node[1].name = model.graph.node[2].name
    assert [f.rule for f in check(model, "trt")] == ["QC-TRT-016"] * 2


@pytest.mark.parametrize(
    ("op", "domain", "rule"), [("MatMulInteger", "", "014"), ("BitwiseAnd", "", "014"), ("Gelu", "com.microsoft", "015")]
)
def test_unsupported_operators(op: str, domain: str, rule: str) -> None:
    model = single(CONV)
    model.graph.node.append(helper.make_node(op, ["y", "y"], ["z"], name="n_z", domain=domain))
    assert rules(model) == {f"QC-TRT-{rule}"}


def test_trt_domain_is_known() -> None:
    assert rules(formats.nvfp4(), gpus=("sm120",)) == set()


def test_codes_must_meet_a_dequantizer() -> None:
    model = single(CONV)
    model.graph.node.append(helper.make_node("Transpose", ["w_codes"], ["t"], name="n_t"))
    assert rules(model) == {"QC-TRT-024"}


def test_transposed_weight_axis_is_followed() -> None:
    """MatMul(x, Transpose(DQ(W, axis 0))) is quantized along the output channels."""
    model = single(MATMUL.but(weight_axis=0))
    model.graph.node.insert(3, helper.make_node("Transpose", ["w_dq"], ["w_t"], name="n_w_t", perm=[1, 0]))
    model.graph.node[-1].input[1] = "w_t"
    assert rules(model) == set()


def test_ort_matmul_add_trap() -> None:
    def model(opset: int, batch: int | str, kind: str = "int8") -> onnx.ModelProto:
        m = single(MATMUL.but(activation=kind, opset=opset, body=TensorProto.FLOAT, scale_type=TensorProto.FLOAT))
        dims = m.graph.input[0].type.tensor_type.shape
        dims.dim[0].dim_value = 5
        first = (
            onnx.TensorShapeProto.Dimension(dim_param=batch)
            if isinstance(batch, str)
            else onnx.TensorShapeProto.Dimension(dim_value=batch)
        )
        dims.dim.insert(0, first)
        m.graph.initializer.append(numpy_helper.from_array(np.zeros(32, np.float32), "bias"))
        m.graph.node.append(helper.make_node("Add", ["y", "bias"], ["out"], name="n_add"))
        del m.graph.output[:]
        m.graph.output.append(helper.make_tensor_value_info("out", TensorProto.FLOAT, None))
        return m

    assert rules(model(21, 2), "ort") == {"QC-ORT-002"} and not loads(model(21, 2))
    for good in (model(19, 2), model(21, "n"), model(21, 2, "uint8")):
        assert rules(good, "ort") == set() and loads(good)


def loads(model: onnx.ModelProto) -> bool:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except ort.capi.onnxruntime_pybind11_state.Fail:
        return False
    return True


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (CONV.but(weight="uint8"), {"QC-ORT-003"}),
        (CONV.but(activation="uint8", zero_point=128), set()),
        (CONV.but(weight_axis=1), {"QC-ORT-006"}),
        (CONV.but(activation_axis=1), {"QC-ORT-007"}),
        (CONV.but(activation="float8e4m3fn", weight="float8e4m3fn"), {"QC-ORT-008"}),
        (CONV.but(scale=0.0), {"QC-ORT-005"}),
        (CONV.but(opset=27), {"QC-ORT-001"}),
        (CONV.but(activation="int16", opset=19), {"QC-ORT-008", "QC-ORT-009"}),
    ],
    ids=lambda v: None if isinstance(v, set) else f"{v.activation}-{v.weight}-{v.opset}",
)
def test_ort_rows(form: Form, expected: set[str]) -> None:
    assert rules(single(form.but(scale_type=TensorProto.FLOAT, body=TensorProto.FLOAT)), "ort") == expected


def test_float_model_is_clean() -> None:
    plain = single(CONV.but(activation=None, weight=None))
    assert all(rules(plain, target) == set() for target in TARGETS if target != "integer")


def test_file_with_external_data(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(single(CONV.but(scale=-1.0)), str(path), save_as_external_data=True, location="m.bin", size_threshold=0)
    assert "QC-TRT-005" in {f.rule for f in check(path, "trt")}
    (tmp_path / "m.bin").unlink()
    with pytest.raises(ModelError, match=r"weights file m\.bin is missing"):
        check(path, "trt")


def test_bad_input(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"\x00not onnx")
    with pytest.raises(ModelError):
        check(tmp_path / "no.onnx", "trt")
    with pytest.raises(ModelError, match="check the path"):
        check(tmp_path / "absent.onnx", "trt")
    with pytest.raises(UsageError, match="tpu"):
        check(single(CONV), "tpu")


def test_catalog() -> None:
    trt, ort = TARGETS["trt"], TARGETS["ort"]
    gemm, matmul = trt.op_rule("Gemm"), trt.op_rule("MatMul")
    assert gemm is not None and matmul is not None
    assert (gemm.axis(2, trans_b=True), gemm.axis(2), matmul.axis(3)) == (0, 1, 2)
    assert trt.capability("float8e4m3fn") == 89 and ort.capability("int8") == 0
    assert (trt.type_opset("INT8"), ort.type_opset("INT8"), trt.type_opset("INT4")) == (19, 13, 21)


def test_attention_default_is_clean() -> None:
    assert rules(attention(AttentionForm())) == set()
