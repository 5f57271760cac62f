"""Triton repositories: read back with the published schema, and run through their own config."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.backend.manifest import sha256, write_manifest
from qcompile.backend.pbtxt import Name, to_text
from qcompile.cli import main
from qcompile.errors import BackendError, GateError, ModelError, QcompileError, UsageError
from qcompile.verbs.deploy.deploy import Deployed, deploy
from qcompile.verbs.deploy.options import DeployOptions
from qcompile.verbs.deploy.parity import Parity
from qcompile.verbs.options import made as options_made
from tests.cli.test_cli import call, document

ROOT = Path(__file__).parents[2]
CNN = ROOT / "models" / "digits_cnn.onnx"
GPT = ROOT / "models" / "char_gpt.onnx"
DATA = str(ROOT / "models" / "digits_cnn.eval.npz")
SHAPES = {"x": [[1, 4], [4, 4], [16, 4]]}


def config_of(folder: Path) -> Any:
    """config.pbtxt parsed with Triton's own schema: unknown fields, wrong types and bad syntax all fail."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), schema.ModelConfig())


def types(config: Any) -> tuple[list[tuple[str, str, list[int]]], list[tuple[str, str, list[int]]]]:
    """(name, type, dims) of inputs and outputs."""
    from tritonclient.grpc import model_config_pb2 as schema

    sides = (config.input, config.output)
    inputs, outputs = ([(t.name, schema.DataType.Name(t.data_type), list(t.dims)) for t in side] for side in sides)
    return inputs, outputs


def linear(folder: Path, batch: str | int = "N", name: str = "m.onnx", external: bool = False, scale: float = 1.0) -> Path:
    """y = x W with x [batch, 4], and a scalar-a-row second output."""
    weight = numpy_helper.from_array((scale * np.arange(12, dtype=np.float32)).reshape(4, 3), "w")
    axes = numpy_helper.from_array(np.array([1], np.int64), "axes")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("ReduceSum", ["y", "axes"], ["s"], keepdims=0)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4])
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 3]),
        helper.make_tensor_value_info("s", TensorProto.FLOAT, [batch]),
    ]
    graph = helper.make_graph(nodes, "g", [x], outputs, [weight, axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / name
    onnx.save(model, str(path), save_as_external_data=external, location=f"{name}.data", size_threshold=64)
    return path


def samples(folder: Path, n: int = 6) -> str:
    np.savez(folder / "data.npz", x=np.random.default_rng(0).standard_normal((n, 4), np.float32))
    return str(folder / "data.npz")


def compared(deployed: Deployed) -> Parity:
    assert deployed.parity is not None
    return deployed.parity


def fake_plan(folder: Path, onnx_path: Path, **changes: Any) -> Path:
    """A file with a TensorRT manifest: what deploy can check of a plan without a GPU."""
    engine = folder / "m.engine"
    engine.write_bytes(b"ftrt" + bytes(100))
    manifest: dict[str, Any] = {
        "backend": "tensorrt", "version": "11.4.1", "target": "trt",
        "compute_capabilities": ["sm89"], "flags": ["STRONGLY_TYPED"],
        "profiles": [{"shapes": SHAPES, "source": "given"}],
        "onnx": {"file": onnx_path.name, "sha256": sha256(onnx_path), "external": {}},
        "engine": {"sha256": sha256(engine), "size": 104},
    }  # fmt: skip
    write_manifest(engine, manifest | changes)
    return engine


# ---- ONNX models ---------------------------------------------------------------------------------------------------


def test_a_model_is_served_as_its_config_says(tmp_path: Path) -> None:
    options = DeployOptions(
        triton=tmp_path / "repo", data=DATA, samples=20, preferred_batch=(2, 4), queue_delay_us=50, instances=2
    )
    made = deploy(CNN, options)
    folder = tmp_path / "repo" / "digits_cnn"
    config = config_of(folder)
    assert (config.name, config.backend, config.default_model_filename) == ("digits_cnn", "onnxruntime", "model.onnx")
    assert types(config) == ([("input", "TYPE_FP32", [1, 32, 32])], [("logits", "TYPE_FP32", [10])])
    assert config.max_batch_size == 8 and list(config.dynamic_batching.preferred_batch_size) == [2, 4]
    assert config.dynamic_batching.max_queue_delay_microseconds == 50 and config.instance_group[0].count == 2
    assert config.version_policy.latest.num_versions == 1
    assert (folder / "1" / "model.onnx").read_bytes() == CNN.read_bytes()
    assert compared(made).equal and compared(made).samples == 20
    assert made.integrity.sha256 == hashlib.sha256(CNN.read_bytes()).hexdigest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["repo"], "no staging folder is left"


def test_the_warm_up_is_a_real_request(tmp_path: Path) -> None:
    deploy(CNN, DeployOptions(triton=tmp_path / "repo", data=DATA, samples=4))
    folder = tmp_path / "repo" / "digits_cnn"
    warmup = config_of(folder).model_warmup[0]
    entry = warmup.inputs["input"]
    raw = (folder / "warmup" / entry.input_data_file).read_bytes()
    assert warmup.batch_size == 1 and list(entry.dims) == [1, 32, 32] and len(raw) == 4 * 32 * 32
    first = np.load(DATA)["input"][0].astype(np.float32)
    assert np.array_equal(np.frombuffer(raw, "<f4").reshape(entry.dims), first)


def test_a_compiled_model_is_compared_with_its_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cnn.ort.onnx"
    assert main([str(CNN), "--target", "ort", "--samples", "32", "-o", str(out)]) == 0
    capsys.readouterr()
    made = document(capsys, "deploy", out, "--triton", tmp_path / "repo", "--reference", CNN, "--name", "cnn")
    (logits,) = made["parity"]["outputs"]
    assert 15 < logits["sqnr_db"] < 100 and logits["max_error"] > 0 and not made["parity"]["equal"]
    assert made["parity"]["reference"] == str(CNN) and made["data"].endswith("digits_cnn.calib.npz")
    refused = ("deploy", out, "--triton", tmp_path / "repo", "--reference", CNN, "--name", "strict", "--min-sqnr", 150)
    code, _, err = call(capsys, *refused)
    assert code == 1 and "below --min-sqnr 150" in err and not (tmp_path / "repo" / "strict").exists()
    code, text, _ = call(capsys, "deploy", out, "--triton", tmp_path / "repo", "--reference", CNN, "--name", "text")
    assert code == 0 and "SQNR" in text and "largest error" in text and "text/1/model.onnx" in text


def test_integers_and_sequences(tmp_path: Path) -> None:
    made = deploy(GPT, DeployOptions(triton=tmp_path / "repo", samples=4))
    config = config_of(tmp_path / "repo" / "char_gpt")
    (inputs, _), fed = types(config), config.model_warmup[0].inputs
    assert {kind for _, kind, _ in inputs} == {"TYPE_INT64"} and compared(made).equal
    assert all(d > 0 for entry in fed.values() for d in entry.dims), "Triton wants fixed dims in a warm-up request"


@pytest.mark.slow
def test_a_model_that_onnx_runtime_cannot_fuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "vit.onnx"
    vit = ROOT / "models" / "vit_digits.onnx"
    words = ("--target", "rtx", "--scheme", "fp8", "--samples", "8", "--verify", "off", "-o", str(out))
    assert main([str(vit), *words]) == 0
    options = DeployOptions(triton=tmp_path / "repo", data=str(ROOT / "models" / "vit_digits.eval.npz"), samples=4)
    with pytest.raises(ModelError, match=r"ONNX Runtime does not load the model.*--accelerator tensorrt"):
        deploy(out, options)
    for reference in (None, vit):
        made = deploy(out, replace(options, accelerator="tensorrt", reference=reference, replace=True))
        assert compared(made).simulated and compared(made).sqnr_db > 15 and any("simulated" in n for n in made.notes)


@pytest.mark.slow
def test_weight_only_models_are_compared_as_they_are_served(tmp_path: Path) -> None:
    out = tmp_path / "gpt.onnx"
    assert main([str(GPT), "--target", "ort", "--scheme", "w4a16", "--samples", "8", "--verify", "off", "-o", str(out)]) == 0
    made = deploy(out, DeployOptions(triton=tmp_path / "repo", data=str(GPT.with_suffix(".calib.npz")), samples=4))
    assert compared(made).equal


def test_external_data_travels_and_scalars_are_reshaped(tmp_path: Path) -> None:
    model = linear(tmp_path, external=True)
    deploy(model, DeployOptions(triton=tmp_path / "repo", data=samples(tmp_path), max_batch=4))
    config = config_of(tmp_path / "repo" / "m")
    assert (tmp_path / "repo" / "m" / "1" / "m.onnx.data").read_bytes() == (tmp_path / "m.onnx.data").read_bytes()
    assert list(config.output[1].dims) == [1] and config.output[1].HasField("reshape") and not config.output[1].reshape.shape


def test_a_fixed_batch_axis_means_full_shapes(tmp_path: Path) -> None:
    model = linear(tmp_path, batch=2)
    made = deploy(model, DeployOptions(triton=tmp_path / "repo", data=samples(tmp_path, 5)))
    config = config_of(tmp_path / "repo" / "m")
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    assert types(config)[0] == [("x", "TYPE_FP32", [2, 4])] and list(config.model_warmup[0].inputs["x"].dims) == [2, 4]
    assert compared(made).samples == 2 and compared(made).equal
    with pytest.raises(UsageError, match="dynamic axis 0"):
        deploy(model, DeployOptions(triton=tmp_path / "repo", name="other", max_batch=4))


def test_no_batching_on_request_and_no_data(tmp_path: Path) -> None:
    made = deploy(linear(tmp_path), DeployOptions(triton=tmp_path / "repo", max_batch=0))
    config = config_of(tmp_path / "repo" / "m")
    assert config.max_batch_size == 0 and types(config)[0] == [("x", "TYPE_FP32", [-1, 4])]
    assert made.parity is None and made.warmup == () and any("--data" in n for n in made.notes)


def test_labels_policy_and_accelerator(tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\n")
    served = {"policy": (1, 3), "accelerator": "tensorrt", "max_batch": 4}
    options = options_made(DeployOptions, {"triton": tmp_path / "repo", "data": samples(tmp_path), "labels": labels, **served})
    deploy(linear(tmp_path), options)
    folder = tmp_path / "repo" / "m"
    config = config_of(folder)
    assert config.output[0].label_filename == "labels.txt" and (folder / "labels.txt").read_text() == "a\nb\nc\n"
    assert list(config.version_policy.specific.versions) == [1, 3]
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt" and accelerator.parameters["trt_profile_max_shapes"] == "x:4x4"


# ---- versions ------------------------------------------------------------------------------------------------------


def test_versions_are_added_and_never_overwritten_silently(tmp_path: Path) -> None:
    repo, model, data = tmp_path / "repo", linear(tmp_path), samples(tmp_path)
    deploy(model, DeployOptions(triton=repo, data=data))
    with pytest.raises(UsageError, match="has a version 1; add --replace"):
        deploy(model, DeployOptions(triton=repo, data=data))
    deploy(linear(tmp_path, scale=2.0), DeployOptions(triton=repo, data=data, version=2))
    assert (repo / "m" / "1" / "model.onnx").read_bytes() != (repo / "m" / "2" / "model.onnx").read_bytes()
    assert sorted(p.name for p in (repo / "m" / "warmup").iterdir()) == ["v1-0.raw", "v2-0.raw"]
    assert config_of(repo / "m").model_warmup[0].inputs["x"].input_data_file == "v2-0.raw"
    deploy(linear(tmp_path, scale=3.0), DeployOptions(triton=repo, data=data, replace=True))
    assert (repo / "m" / "1" / "model.onnx").read_bytes() == model.read_bytes()
    assert sorted(p.name for p in repo.iterdir()) == ["m"] and sorted(p.name for p in (repo / "m").iterdir()) == [
        "1",
        "2",
        "config.pbtxt",
        "warmup",
    ]


def test_another_interface_or_a_foreign_config_is_not_overwritten(tmp_path: Path) -> None:
    repo, model = tmp_path / "repo", linear(tmp_path)
    deploy(model, DeployOptions(triton=repo))
    with pytest.raises(UsageError, match="other inputs, outputs or batch size"):
        deploy(model, DeployOptions(triton=repo, version=2, max_batch=4))
    (repo / "m" / "config.pbtxt").write_text('name: "m"\n')
    with pytest.raises(UsageError, match="not written by qcompile deploy"):
        deploy(model, DeployOptions(triton=repo, version=2))
    assert not (repo / "m" / "2").exists()


def test_a_failing_check_leaves_the_repository_as_it_was(tmp_path: Path) -> None:
    model, other = linear(tmp_path), linear(tmp_path, name="other.onnx", batch=1)
    with pytest.raises(QcompileError):
        deploy(model, DeployOptions(triton=tmp_path / "repo", data=samples(tmp_path), reference=other))
    assert list((tmp_path / "repo").iterdir()) == [] and not list(tmp_path.glob(".m.*"))


def test_an_output_that_does_not_follow_the_batch_is_refused(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["K", 4])
    node = helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=1)
    axes = numpy_helper.from_array(np.array([0], np.int64), "axes")
    graph = helper.make_graph([node], "g", [x], [y], [axes])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(tmp_path / "m.onnx"))
    with pytest.raises(GateError, match="no batch axis"):
        deploy(tmp_path / "m.onnx", DeployOptions(triton=tmp_path / "repo", data=samples(tmp_path)))


# ---- plans ---------------------------------------------------------------------------------------------------------


def test_a_plan_is_checked_against_its_manifest(tmp_path: Path) -> None:
    engine = fake_plan(tmp_path, linear(tmp_path))
    made = deploy(engine, DeployOptions(triton=tmp_path / "repo", data=samples(tmp_path)))
    folder = tmp_path / "repo" / "m"
    config = config_of(folder)
    assert (config.backend, config.platform, config.max_batch_size) == ("tensorrt", "tensorrt_plan", 16)
    assert (folder / "1" / "model.plan").read_bytes() == engine.read_bytes()
    assert list(config.model_warmup[0].inputs["x"].dims) == [4] and not config.instance_group[0].profile
    assert made.parity is None and any("needs a GPU (sm89)" in n and "11.4.1" in n for n in made.notes)
    with pytest.raises(UsageError, match="profile ends at 16"):
        deploy(engine, DeployOptions(triton=tmp_path / "repo", max_batch=32, replace=True))


def test_profiles_become_contexts_of_the_instances(tmp_path: Path) -> None:
    two = [{"shapes": SHAPES}, {"shapes": {"x": [[1, 4], [8, 4], [8, 4]]}}]
    engine = fake_plan(tmp_path, linear(tmp_path), profiles=two, flags=["STRONGLY_TYPED", "VERSION_COMPATIBLE"])
    made = deploy(engine, DeployOptions(triton=tmp_path / "repo", name="p"))
    config = config_of(tmp_path / "repo" / "p")
    assert list(config.instance_group[0].profile) == ["0", "1"] and config.max_batch_size == 8
    assert any("version-compatible=true" in n for n in made.notes)


def test_engines_that_triton_cannot_load(tmp_path: Path) -> None:
    model, repo = linear(tmp_path), tmp_path / "repo"
    engine = fake_plan(tmp_path, model, target="rtx", backend="tensorrt_rtx")
    with pytest.raises(BackendError, match=r"tensorrt_rtx.*--target trt.*deploy m.onnx --accelerator tensorrt"):
        deploy(engine, DeployOptions(triton=repo))
    engine = fake_plan(tmp_path, model)
    engine.write_bytes(b"ftrt" + bytes(99))
    with pytest.raises(BackendError, match="not the engine that its manifest describes"):
        deploy(engine, DeployOptions(triton=repo))
    linear(tmp_path, scale=5.0)
    with pytest.raises(BackendError, match="manifest"):
        deploy(engine, DeployOptions(triton=repo))
    fake_plan(tmp_path, model, onnx={"file": model.name, "sha256": "0", "external": {}})
    with pytest.raises(ModelError, match=r"not the model that m\.engine was built from"):
        deploy(engine, DeployOptions(triton=repo))
    (tmp_path / "m.engine.json").unlink()
    with pytest.raises(ModelError, match="without its manifest"):
        deploy(engine, DeployOptions(triton=repo))
    assert list(repo.iterdir()) == []


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--preferred-batch", "4,x"), 2, "not a list of numbers"),
        (("--preferred-batch", "64"), 2, "not within 1..8"),
        (("--max-batch", "0", "--queue-delay-us", "5"), 2, "need a batch axis"),
        (("--name", "../x"), 2, "cannot be the name"),
        (("--backend", "tensorrt"), 2, "qcompile build"),
        (("--onnx", "x.onnx"), 2, "belongs to an engine"),
        (("--min-sqnr", "20"), 2, "--data"),
        (("--labels", "none.txt"), 2, "no labels at none.txt"),
    ],
)
def test_wrong_words(words: tuple[str, ...], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got, _, err = call(capsys, "deploy", linear(tmp_path), "--triton", tmp_path / "repo", *words)
    assert got == code and says in err and err.count("\n") == 1


def test_several_models_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = linear(tmp_path), linear(tmp_path, name="n.onnx")
    made = document(capsys, "deploy", one, two, "--triton", tmp_path / "repo")
    assert [m["name"] for m in made["models"]] == ["m", "n"] and json.dumps(made)
    code, _, err = call(capsys, "deploy", one, two, "--triton", tmp_path / "repo", "--name", "x")
    assert code == 2 and "--name names one model" in err


def test_text_format_escapes_and_nests() -> None:
    text = to_text(
        {"name": 'a"b\\é', "kind": Name("KIND_CPU"), "on": True, "dims": [1, -1], "empty": {}, "in": [{"x": 1}, {"x": 2}]}
    )
    assert text == (
        'name: "a\\042b\\134\\303\\251"\nkind: KIND_CPU\non: true\n'
        "dims: 1\ndims: -1\nempty { }\nin {\n  x: 1\n}\nin {\n  x: 2\n}\n"
    )
    with pytest.raises(TypeError):
        to_text({"x": 1.5})
