"""Measure the models of this folder on their held-out data (numpy, onnx and onnxruntime only).

usage: measure.py            measure, compare with manifest.json, exit 1 where a digest or a figure differs
       measure.py --write    measure and record digests, sizes, parameter counts and accuracies in manifest.json
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

HERE = Path(__file__).parent
MANIFEST = HERE / "manifest.json"
BATCH = 50


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parameter_count(path: Path) -> int:
    """Number of elements in the floating-point initializers."""
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    weights = [t for t in onnx.load(path).graph.initializer if t.data_type in floats]
    return sum(int(np.prod(t.dims)) for t in weights)


def logits(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Output of the model for all samples (first axis), in batches of 50, on one CPU thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    count = len(next(iter(inputs.values())))
    starts = range(0, count, BATCH)
    return np.concatenate([session.run(None, {k: v[i : i + BATCH] for k, v in inputs.items()})[0] for i in starts])


def scores(task: str, outputs: np.ndarray, labels: np.ndarray) -> dict[str, float | int]:
    """Top-1 of [..., classes] against integer labels [...]; next-token models also give nats per token."""
    result: dict[str, float | int] = {"top1": round(float((outputs.argmax(-1) == labels).mean()), 4)}
    if task == "next-token":
        z = outputs.astype(np.float64) - outputs.max(-1, keepdims=True)
        picked = np.take_along_axis(z, labels[..., None], -1)[..., 0] - np.log(np.exp(z).sum(-1))
        result["nats_per_token"] = round(float(-picked.mean()), 4)
    result["samples"] = len(labels)
    return result


def measure(entry: dict[str, Any]) -> dict[str, Any]:
    """What can be computed of a manifest entry: digest, size, parameters, and the scores where data is shipped."""
    path = HERE / entry["file"]
    facts: dict[str, Any] = {"sha256": digest(path), "bytes": path.stat().st_size, "parameters": parameter_count(path)}
    data = {part: {**info, "sha256": digest(HERE / info["file"])} for part, info in entry["data"].items()}
    if "eval" in data:
        with np.load(HERE / data["eval"]["file"]) as arrays:
            inputs = {name: arrays[name] for name in arrays.files if name != "labels"}
            facts["float_accuracy"] = scores(entry["task"], logits(path, inputs), arrays["labels"])
    return {**facts, "data": data}


def measure_golden(entry: dict[str, Any]) -> dict[str, Any]:
    """Digest, size and accuracy of an integer-only model, and the digest of the integers that it must compute."""
    path, expected = HERE / entry["file"], entry["expected"]
    with np.load(HERE / entry["eval"]) as arrays:
        inputs = {name: arrays[name] for name in arrays.files if name != "labels"}
        accuracy = scores(entry["task"], logits(path, inputs), arrays["labels"])
    facts = {"sha256": digest(path), "bytes": path.stat().st_size, "accuracy": accuracy}
    return {**facts, "expected": {**expected, "sha256": digest(HERE / expected["file"])}}


def main() -> int:
    """Print one line a model; return the exit code."""
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    measured = [{**entry, **measure(entry)} for entry in manifest["models"]]
    goldens = [{**entry, **measure_golden(entry)} for entry in manifest["goldens"]]
    known = [*manifest["models"], *manifest["goldens"]]
    differing = [new["name"] for new, old in zip([*measured, *goldens], known, strict=True) if new != old]
    for entry in measured:
        print(f"{entry['name']:24} {entry['parameters']:>8} parameters  {entry['float_accuracy']}")
    for entry in goldens:
        print(f"{entry['name']:24} {entry['bytes']:>8} bytes       {entry['accuracy']}")
    if "--write" in sys.argv:
        text = json.dumps({**manifest, "models": measured, "goldens": goldens}, indent=2)
        MANIFEST.write_text(text + "\n", encoding="utf-8")
        return 0
    print(f"differs from manifest.json: {', '.join(differing)}" if differing else "manifest.json holds")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
