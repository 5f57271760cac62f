"""The kernel dump parser on recorded lines (shortened from tensorrt-rtx 1.7.1.116)."""

from __future__ import annotations

import pytest

from qcompile.backend.dump import covering, parse_dump


def tensor(dims: str, dtype: str) -> str:
    return f"{{ Name: t [a, b], Dimensions: [{dims}], Strides: [1], StrideOrder: [0], Datatype: {dtype}, Format: (Linear) }}"


def line(name: str, kind: str, inputs: list[str], constants: list[str], metadata: str, stream: str = "StreamId: 0,") -> str:
    sides = f"Inputs: [ {', '.join(inputs)}], Constants: [ {', '.join(constants)}], Outputs: [ {tensor('-1,8', 'Half')}]"
    return f"Name: {name}, LayerType: {kind}, {sides}, TacticName: stub, {stream} Metadata: {metadata}"


A, W, H = tensor("-1,8", "Int8"), tensor("8,16", "Int8"), tensor("8,16", "Half")
ALPHA = tensor("1", "Float")
DUMP = "\n".join(
    [
        "Layers:",
        "Name: s, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: ",
        "Name: w, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 1, EventId: 1, Metadata:  ",
        line("a+b", "gemm", [A], [W, ALPHA], "[ONNX Layer: /q/MatMul[0]]\x1f[ONNX Layer: /k/MatMul]\x1e[ONNX Layer: dq]"),
        line("fuse", "runtime_fusion", [A], [W, H], "[ONNX Layer: fc]"),
        line("c", "correlation", [A, tensor("-1,8", "Half")], [H], "[ONNX Layer: conv]"),
        line("_gemm_mha_v2_0", "kgen", [A, A, A, H], [], "[ONNX Layer: s]\x1f[ONNX Layer: v]"),
        line("half_mha", "kgen", [A, A, H], [], "[ONNX Layer: s2]"),
        line("epilogue", "kgen", [A, A], [], "[ONNX Layer: fc]"),
        line("bmm", "gemm", [A, A], [ALPHA, ALPHA], "[ONNX Layer: bmm]"),
        "",
        "I/O Tensors:",
        " Name: x, IOMode: Input",
    ]
)


def test_kernels() -> None:
    dump = parse_dump(DUMP)
    kernels = dump.kernels
    assert dump.unread == 0 and not dump.blind
    assert [k.type for k in kernels][:4] == ["shape_call", "wait", "gemm", "runtime_fusion"]
    assert {k.name: k.reads() for k in kernels if k.compute} == {
        "a+b": "int8",
        "fuse": None,
        "c": None,
        "_gemm_mha_v2_0": "int8",
        "half_mha": None,
        "bmm": "int8",
    }
    cover = covering(kernels)
    assert [k.name for k in cover["fc"]] == ["fuse"] and cover["/q/MatMul[0]"] == cover["/k/MatMul"]


NO_KERNELS = [
    "Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], Outputs: [ { Name: (Unnamed 7) [Cast]_out, "
    "Location: Device, Dimensions: [1], Datatype: Int32, Format: none }], ParameterType: ShapeH2D, shapeValues0: [-4, -5], "
    "TacticValue: 0x0, StreamId: 0, Metadata: ",
    "Name: c, LayerType: cjmp, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, JumpTargetThen: a, "
    "JumpTargetElse: <EXIT>, Metadata: [ONNX Layer: if]",
    "Name: j, LayerType: jmp, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, JumpTarget: b, Metadata: ",
    "Name: other, LayerType: Reformat, Inputs: [], Outputs: [], ParameterType: Reformat",
]


def test_layers_without_kernels() -> None:
    dump = parse_dump("\n".join(["Layers:", *NO_KERNELS]))
    assert dump.unread == 0
    assert [k.type for k in dump.kernels] == ["ShapeHostToDevice", "cjmp", "jmp", "Reformat"]
    assert [k.nodes for k in dump.kernels] == [(), ("if",), (), ()]


def test_an_unknown_line_costs_itself() -> None:
    dump = parse_dump(DUMP.replace("LayerType: runtime_fusion", "Kind: runtime_fusion"))
    assert dump.unread == 1 and not dump.blind
    assert len(dump.kernels) == len(parse_dump(DUMP).kernels) - 1


@pytest.mark.parametrize(("text", "unread"), [(DUMP.replace("LayerType", "Kind"), 9), (DUMP.replace("ONNX Layer", "Node"), 7)])
def test_unknown_forms(text: str, unread: int) -> None:
    dump = parse_dump(text)
    assert dump.blind and dump.unread == unread


def test_names_are_given_back() -> None:
    dump = parse_dump(DUMP, {"fc": "f\nc"})
    assert {n for k in dump.kernels for n in k.nodes} >= {"f\nc", "conv"}
