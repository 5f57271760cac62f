"""The kernel dump parser on recorded lines (shortened from tensorrt-rtx 1.7.1.116)."""

from __future__ import annotations

import pytest

from qcompile.backend.dump import covering, parse_dump
from qcompile.errors import BackendError


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
    kernels = parse_dump(DUMP, "1.7.1.116")
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


@pytest.mark.parametrize(
    "text", ["", "Layers:\nsomething else", DUMP.replace("LayerType", "Kind"), DUMP.replace("ONNX Layer", "Node")]
)
def test_unknown_formats(text: str) -> None:
    with pytest.raises(BackendError, match=r"9\.9.*tested with 1\.7\.1\.116"):
        parse_dump(text, "9.9")
