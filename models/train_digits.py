"""Train the two digit classifiers of this folder on a CPU and export them to ONNX.

Data: the 1797 handwritten digits that ship with scikit-learn (UCI "Optical Recognition of Handwritten Digits"), 8x8 pixels
of 0..16, enlarged to 32x32 (bilinear) and mapped to [-1, 1]. A stratified part of 500 images is held out and never trained on.
PyTorch and scikit-learn are development tools: nothing else in the repository needs them.

usage: train_digits.py vit|cnn|data [OUT_DIR]
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

SIZE, PATCH, CLASSES = 32, 4, 10
CALIBRATION_SAMPLES, EVAL_SAMPLES = 200, 500


class Attention(nn.Module):
    """Multi-head attention with one fused qkv linear. [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * self.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class Block(nn.Module):
    """Pre-norm transformer block. [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def sincos_positions(side: int, dim: int) -> Tensor:
    """2-D sine-cosine positions, class token (zeros) first. [1, side * side + 1, dim]; a start from which few steps suffice."""
    rates = 1 / 100 ** (torch.arange(dim // 4) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.flatten()[:, None] * rates for axis in (rows, columns)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)
    return torch.cat([torch.zeros(1, dim), table])[None]


class VisionTransformer(nn.Module):
    """Plain pre-norm ViT. [B, 1, 32, 32] -> [B, 10]; `keep` patch tokens are seen in training (PatchDropout)."""

    def __init__(self, dim: int = 128, depth: int = 6, heads: int = 4, hidden: int = 512) -> None:
        super().__init__()
        self.patches = (SIZE // PATCH) ** 2
        self.patch_embed = nn.Conv2d(1, dim, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(sincos_positions(SIZE // PATCH, dim))
        self.blocks = nn.Sequential(*[Block(dim, heads, hidden) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, CLASSES)
        self.keep = self.patches
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02 if module is self.head else 0.05)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        if self.training and self.keep < self.patches:
            chosen = torch.randperm(self.patches)[: self.keep] + 1
            x = torch.cat([x[:, :1], x[:, chosen]], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, then BatchNorm (the exporter folds it)."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """ResNet basic block with a 1x1 projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(inputs, outputs, 3, stride), conv_bn(outputs, outputs, 3)
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class DepthwiseSeparable(nn.Module):
    """MobileNet v1 block: 3x3 depthwise, 1x1 pointwise, ReLU6 after each."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise, self.pointwise = conv_bn(inputs, inputs, 3, stride, inputs), conv_bn(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.pointwise(F.relu6(self.depthwise(x))))


class ResidualCnn(nn.Module):
    """Stem, two residual stages, one depthwise-separable stage, pooled linear head. [B, 1, 32, 32] -> [B, 10]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = conv_bn(1, width, 3, 2)
        self.stages = nn.Sequential(
            Residual(width, width, 1),
            Residual(width, 2 * width, 2),
            DepthwiseSeparable(2 * width, 4 * width, 2),
            DepthwiseSeparable(4 * width, 4 * width, 1),
        )
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(F.relu(self.stem(x))).mean((2, 3)))


def load_split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Preprocessed train images [1297, 1, 32, 32], train labels, held-out images [500, 1, 32, 32], held-out labels."""
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    images = F.interpolate(small, (SIZE, SIZE), mode="bilinear", align_corners=False) / 8 - 1
    rows = np.arange(len(images))
    train, held_out = train_test_split(rows, test_size=EVAL_SAMPLES, random_state=0, stratify=digits.target)
    labels = torch.tensor(digits.target, dtype=torch.long)
    return images[train], labels[train], images[held_out], labels[held_out]


def augment(x: Tensor) -> Tensor:
    """Random rotation, scale, shear and shift of each image; the outside is background (-1)."""
    n = len(x)

    def spread(width: float) -> Tensor:
        return (torch.rand(n) * 2 - 1) * width

    angle, shear, shift = spread(0.2), spread(0.1), torch.stack([spread(0.1), spread(0.1)], 1)
    cos, sin, scale_x, scale_y = angle.cos(), angle.sin(), 1 + spread(0.1), 1 + spread(0.1)
    rows = [torch.stack([cos * scale_x, -sin + shear], 1), torch.stack([sin + shear, cos * scale_y], 1)]
    theta = torch.cat([torch.stack(rows, 1), shift[:, :, None]], 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def token_schedule(progress: float, patches: int) -> int:
    """A quarter of the patches for most of the training, then half, then all of them: the same result in a third of the time."""
    return patches // 4 if progress < 0.55 else patches // 2 if progress < 0.85 else patches


def train(net: nn.Module, x: Tensor, y: Tensor, steps: int, peak: float, decay: float) -> None:
    """AdamW, 8 % linear warm-up, cosine decay, label smoothing 0.05, gradient norm clipped to 1."""
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=decay, betas=(0.9, 0.98))
    start = time.time()
    net.train()
    for step in range(steps):
        progress = step / steps
        rate = peak * min(1.0, progress / 0.08 + 0.01) * 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = rate
        if isinstance(net, VisionTransformer):
            net.keep = token_schedule(progress, net.patches)
        chosen = torch.randint(0, len(x), (64,))
        loss = F.cross_entropy(net(augment(x[chosen])), y[chosen], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.time() - start:.0f} s", flush=True)
    net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Top-1 accuracy in [0, 1]."""
    return float((torch.cat([net(part) for part in x.split(100)]).argmax(1) == y).float().mean())


def export(net: nn.Module, path: Path) -> None:
    """Write float32 ONNX, opset 17, with a dynamic batch axis N."""
    axes = {"input": {0: "N"}, "logits": {0: "N"}}
    example = torch.zeros(1, 1, SIZE, SIZE)
    names = {"input_names": ["input"], "output_names": ["logits"]}
    torch.onnx.export(net, (example,), str(path), opset_version=17, dynamo=False, dynamic_axes=axes, **names)


def save_data(out: Path) -> None:
    """Write calibration (from the training part) and evaluation (held out) arrays for both models."""
    x, y, held_x, held_y = load_split()
    for name in ("vit_digits", "digits_cnn"):
        calib = {"input": x[:CALIBRATION_SAMPLES].numpy(), "labels": y[:CALIBRATION_SAMPLES].numpy()}
        np.savez_compressed(out / f"{name}.calib.npz", **calib)
        np.savez_compressed(out / f"{name}.eval.npz", input=held_x.numpy(), labels=held_y.numpy())


def main() -> None:
    """Train one model, or write the data files."""
    which, out = sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if which == "data":
        return save_data(out)
    x, y, held_x, held_y = load_split()
    net, name = (VisionTransformer(), "vit_digits") if which == "vit" else (ResidualCnn(), "digits_cnn")
    parameters = sum(p.numel() for p in net.parameters())
    train(net, x, y, *((1300, 1e-3, 0.05) if which == "vit" else (900, 4e-3, 0.02)))
    print(f"{name}: {parameters} parameters, held-out top-1 {accuracy(net, held_x, held_y):.4f}", flush=True)
    export(net, out / f"{name}.onnx")
    return None


if __name__ == "__main__":
    main()
