"""Networks of well-known architectures with random weights, exported by today's torch: NAME.onnx and NAME.data.npz in a folder.

    python tools/export_models.py FOLDER [--only GLOB] [--runs N]

Runs in an environment of its own with torch, torchvision, timm, transformers, diffusers, ultralytics, onnx and onnxscript;
nothing is downloaded.  `bench_models.py --models FOLDER` reads what it writes.  What cannot be exported is said and left out.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true"}

import numpy as np
import torch
from torch import nn

SMALL = (
    "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050", "efficientnet_lite0", "efficientnet_b0", "resnet18",
    "regnety_002", "poolformer_s12", "ghostnet_050", "edgenext_xx_small", "tinynet_e", "lcnet_050", "xcit_nano_12_p16_224",
    "mnasnet_small", "hrnet_w18_small", "repvgg_a0",
)  # fmt: skip
LARGER = {"swin_tiny_patch4_window7_224": 112, "mobilevit_xxs": 128, "fastvit_t8": 128, "levit_128s": 224, "mixer_s32_224": 224}
TIMM = dict.fromkeys(SMALL, 96) | LARGER
YOLO = (
    "yolov3-tiny",
    "yolov5n",
    "yolov8n",
    "yolov8n-seg",
    "yolov8n-pose",
    "yolov9t",
    "yolov10n",
    "yolo11n",
    "yolo11n-obb",
    "yolo12n",
)
Tensors = dict[str, torch.Tensor]


@dataclass
class Job:
    """A network, what makes the inputs of a run, and which axes are dynamic."""

    net: nn.Module
    inputs: Callable[[torch.Generator], Tensors]
    dynamic: dict[str, dict[int, str]] | None = None


def pictures(size: int, channels: int = 3) -> Callable[[torch.Generator], Tensors]:
    """Smooth random pictures."""

    def made(rng: torch.Generator) -> Tensors:
        small = torch.randn(1, channels, 7, 7, generator=rng)
        return {
            "x": nn.functional.interpolate(small, (size, size), mode="bicubic")
            + 0.05 * torch.randn(1, channels, size, size, generator=rng)
        }

    return made


def ids(length: int, high: int, mask: bool = False) -> Callable[[torch.Generator], Tensors]:
    """Token ids, and a mask of ones."""

    def made(rng: torch.Generator) -> Tensors:
        words = {"input_ids": torch.randint(2, high, (1, length), generator=rng)}
        return words | ({"attention_mask": torch.ones(1, length, dtype=torch.int64)} if mask else {})

    return made


class Picked(nn.Module):
    """A network whose outputs are picked from what it gives, its inputs named."""

    def __init__(self, net: nn.Module, pick: Callable[[Any], Any], call: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.net, self.pick, self.call = net, pick, call

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.pick(self.call(self.net, **inputs) if self.call else self.net(**inputs))


def timm_job(name: str, size: int) -> Job:
    """A classifier of timm."""
    import timm

    sized = {"img_size": size} if any(k in name for k in ("vit_tiny", "swin", "mixer", "xcit")) and size != 224 else {}
    net = timm.create_model(name, pretrained=False, num_classes=100, **sized)
    return Job(Picked(net, lambda y: y, lambda n, x: n(x)), pictures(size), {"x": {0: "N"}})


def yolo_job(name: str) -> Job:
    """A detector of ultralytics with its exported head."""
    from ultralytics import YOLO as Detector

    net = Detector(f"{name}.yaml").model.float().eval()
    for module in net.modules():
        if hasattr(module, "export"):
            module.export, module.format, module.dynamic = True, "onnx", False
    return Job(Picked(net, lambda y: y, lambda n, x: n(x)), pictures(160))


def text_job(kind: str, **sizes: Any) -> Job:
    """An encoder of transformers."""
    import transformers as t

    names = {
        "bert": "Bert",
        "roberta": "Roberta",
        "distilbert": "DistilBert",
        "deberta": "DebertaV2",
        "albert": "Albert",
        "mpnet": "MPNet",
    }
    small = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = getattr(t, f"{names[kind]}Config")(**small | sizes)
    net = getattr(t, f"{names[kind]}Model")(config)
    return Job(Picked(net, lambda y: y[0]), ids(24, 300, True), {"input_ids": {1: "T"}, "attention_mask": {1: "T"}})


def decoder_job(kind: str) -> Job:
    """A decoder of transformers with its cache in and out, one step."""
    import transformers as t

    small = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    grouped = {"num_key_value_heads": 2, "head_dim": 16}
    names = {"llama": "Llama", "qwen2": "Qwen2", "gemma2": "Gemma2", "phi": "Phi", "mistral": "Mistral"}
    config = getattr(t, f"{names[kind]}Config")(**small | ({} if kind == "phi" else grouped), pad_token_id=0)
    heads = config.num_key_value_heads or 4
    net = getattr(t, f"{names[kind]}ForCausalLM")(config)

    def call(net: nn.Module, input_ids: torch.Tensor, **past: torch.Tensor) -> Any:
        cache = t.DynamicCache(ddp_cache_data=[(past[f"k{i}"], past[f"v{i}"]) for i in range(2)])
        return net(input_ids=input_ids, past_key_values=cache, use_cache=True)

    def pick(y: Any) -> Any:
        return (y.logits, *(t for layer in y.past_key_values.layers for t in (layer.keys, layer.values)))

    def inputs(rng: torch.Generator) -> Tensors:
        past = {f"{kv}{i}": torch.randn(1, heads, 12, 16, generator=rng) for i in range(2) for kv in "kv"}
        return ids(1, 300)(rng) | past

    return Job(Picked(net, pick, call), inputs, {n: {2: "past"} for n in ("k0", "v0", "k1", "v1")} | {"input_ids": {}})


def t5_job() -> Job:
    """Encoder and decoder in one, teacher-forced."""
    import transformers as t

    net = t.T5ForConditionalGeneration(t.T5Config(vocab_size=300, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4))

    def inputs(rng: torch.Generator) -> Tensors:
        return ids(20, 300)(rng) | {"decoder_input_ids": torch.randint(2, 300, (1, 8), generator=rng)}

    return Job(Picked(net, lambda y: y[0], lambda n, **i: n(**i, use_cache=False)), inputs)


def whisper_job(part: str) -> Job:
    """Encoder, or encoder and decoder."""
    import transformers as t

    sizes = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    sizes |= {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_source_positions": 50, "max_target_positions": 32}
    config = t.WhisperConfig(vocab_size=300, num_mel_bins=40, suppress_tokens=[], begin_suppress_tokens=[], **sizes, **tokens)
    net = t.WhisperForConditionalGeneration(config)
    whole = part == "whole"

    def inputs(rng: torch.Generator) -> Tensors:
        heard = {"input_features": torch.randn(1, 40, 100, generator=rng)}
        return heard | ({"decoder_input_ids": torch.randint(2, 300, (1, 8), generator=rng)} if whole else {})

    return Job(
        Picked(net if whole else net.model.encoder, lambda y: y[0], lambda n, **i: n(**i, use_cache=False) if whole else n(**i)),
        inputs,
    )


def vision_job(kind: str) -> Job:
    """Transformers of pictures."""
    import transformers as t

    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    made = {
        "clip_vision": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**small, image_size=64, patch_size=16)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**small, image_size=64, patch_size=16)),
        "segformer": lambda: t.SegformerForSemanticSegmentation(t.SegformerConfig(depths=[1, 1, 1, 1], num_labels=5)),
        "yolos": lambda: t.YolosForObjectDetection(t.YolosConfig(**small, image_size=[64, 64], num_detection_tokens=10)),
        "rtdetr": _rtdetr,
    }
    pick = (lambda y: (y.logits, y.pred_boxes)) if kind in ("yolos", "rtdetr") else (lambda y: y[0])
    return Job(Picked(made[kind](), pick, lambda n, x: n(pixel_values=x)), pictures(128 if kind == "rtdetr" else 64))


def _rtdetr() -> nn.Module:
    import transformers as t

    stages = {"hidden_sizes": [32, 32, 64, 64], "embedding_size": 16, "out_features": ["stage2", "stage3", "stage4"]}
    backbone = t.RTDetrResNetConfig(depths=[1, 1, 1, 1], layer_type="basic", **stages)
    widths = {"d_model": 64, "encoder_hidden_dim": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    channels = {"encoder_in_channels": [32, 64, 64], "decoder_in_channels": [64, 64, 64], "decoder_attention_heads": 4}
    config = t.RTDetrConfig(backbone_config=backbone, decoder_layers=2, num_queries=20, num_labels=5, **widths, **channels)
    return t.RTDetrForObjectDetection(config)


def wav2vec2_job() -> Job:
    """Speech."""
    import transformers as t

    net = t.Wav2Vec2Model(
        t.Wav2Vec2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, conv_dim=(32,) * 7)
    )
    return Job(Picked(net, lambda y: y[0], lambda n, x: n(x)), lambda rng: {"x": torch.randn(1, 3200, generator=rng)})


def diffusion_job(kind: str) -> Job:
    """Networks of diffusers."""
    import diffusers as d

    sized = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}

    def noisy(rng: torch.Generator) -> Tensors:
        return {"x": torch.randn(1, 4, 16, 16, generator=rng), "t": torch.randint(0, 1000, (1,), generator=rng)}

    if kind == "vae":
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        return Job(Picked(d.AutoencoderKL(**sized, **blocks).decoder, lambda y: y, lambda n, x: n(x)), pictures(16, 4))
    if kind == "dit":
        net = d.DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=16, norm_num_groups=8
        )
        labels = {"labels": torch.ones(1, dtype=torch.int64)}
        return Job(Picked(net, lambda y: y[0], lambda n, x, t, labels: n(x, t, labels)), lambda rng: noisy(rng) | labels)
    if kind == "unet":
        net = d.UNet2DModel(
            16, 4, 4, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), **sized
        )
        return Job(Picked(net, lambda y: y[0], lambda n, x, t: n(x, t)), noisy)
    net = d.UNet2DConditionModel(
        16, 4, 4, cross_attention_dim=32, attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **sized,
    )  # fmt: skip
    text = lambda rng: noisy(rng) | {"text": torch.randn(1, 7, 32, generator=rng)}  # noqa: E731
    return Job(Picked(net, lambda y: y[0], lambda n, x, t, text: n(x, t, text)), text)


def torchvision_job(name: str) -> Job:
    """Detectors and segmenters of torchvision."""
    import torchvision

    net = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    if "ssd" in name or "retina" in name:
        call = lambda n, x: n([x[0]])[0]  # noqa: E731
        return Job(Picked(net, lambda y: (y["boxes"], y["scores"], y["labels"]), call), pictures(160))
    return Job(Picked(net, lambda y: y["out"] if isinstance(y, dict) else y, lambda n, x: n(x)), pictures(96))


def jobs() -> dict[str, Callable[[], Job]]:
    """Everything there is, by name."""
    made: dict[str, Callable[[], Job]] = {f"timm_{n}": lambda n=n, s=s: timm_job(n, s) for n, s in TIMM.items()}
    made |= {f"ultra_{n}": lambda n=n: yolo_job(n) for n in YOLO}
    made |= {f"hf_{k}": lambda k=k: text_job(k) for k in ("bert", "roberta", "deberta", "albert", "mpnet")}
    made |= {f"hf_{k}_cache": lambda k=k: decoder_job(k) for k in ("llama", "qwen2", "gemma2", "phi", "mistral")}
    made |= {"hf_t5": t5_job, "hf_whisper_encoder": lambda: whisper_job("encoder"), "hf_whisper": lambda: whisper_job("whole")}
    made |= {f"hf_{k}": lambda k=k: vision_job(k) for k in ("clip_vision", "dinov2", "segformer", "yolos", "rtdetr")}
    made |= {"hf_wav2vec2": wav2vec2_job}
    made |= {f"diffusers_{k}": lambda k=k: diffusion_job(k) for k in ("vae", "dit", "unet", "sd_unet")}
    return made | {
        f"tv_{n}": lambda n=n: torchvision_job(n)
        for n in ("ssdlite320_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "shufflenet_v2_x0_5")
    }


def export(job: Job, path: Path, runs: int) -> None:
    """Write the model and its data; random weights, the same every time.  Sizes that cannot be dynamic are fixed."""
    rng = torch.Generator().manual_seed(1)
    data = [job.inputs(rng) for _ in range(runs)]
    shapes = {"inputs": job.dynamic and {n: {a: torch.export.Dim(d) for a, d in job.dynamic.get(n, {}).items()} for n in data[0]}}
    try:
        program = _exported(job.net.eval(), data[0], shapes if job.dynamic else None)
    except torch.onnx.errors.OnnxExporterError:
        if not job.dynamic:
            raise
        program = _exported(job.net, data[0], None)
    program.save(path, external_data=False)
    np.savez(path.with_suffix(".data.npz"), **{n: np.stack([r[n].numpy() for r in data]) for n in data[0]})


def _exported(net: nn.Module, inputs: Tensors, shapes: dict[str, Any] | None) -> Any:
    named = {"input_names": list(inputs), "dynamic_shapes": shapes}
    return torch.onnx.export(net, (), kwargs=inputs, dynamo=True, verbose=False, **named)


def main() -> None:
    """Export what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", action="append", metavar="GLOB", help="of names; repeatable")
    parser.add_argument("--runs", type=int, default=12)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name, made in jobs().items():
        path = options.folder / f"{name}.onnx"
        asked = not options.only or any(fnmatch.fnmatch(name, glob) for glob in options.only)
        if not asked or path.with_suffix(".data.npz").is_file():
            continue
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                export(made(), path, options.runs)
            print(f"{name}: {path.stat().st_size / 1e6:.1f} MB", flush=True)
        except Exception as error:
            print(
                f"{name}: left out: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
                file=sys.stderr,
                flush=True,
            )


if __name__ == "__main__":
    main()
