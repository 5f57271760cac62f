"""Train the character GPT of this folder on tiny Shakespeare on a CPU and export it to ONNX.

The first 90 % of the characters are the training text, the last 10 % the validation text. PyTorch is a development tool.

usage: train_char_gpt.py INPUT.txt OUT_DIR [minutes]
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT = 128


class Block(nn.Module):
    """Pre-norm transformer block with one fused qkv linear. [B, T, C] -> [B, T, C]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.n1, self.n2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.n1(x)).reshape(b, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q @ k.transpose(-2, -1)) * self.head_dim**-0.5 + mask).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(b, t, c))
        return x + self.fc2(F.gelu(self.fc1(self.n2(x))))


class CharGpt(nn.Module):
    """Character GPT with an additive causal mask. [B, 128] of int64 -> [B, 128, vocabulary]."""

    def __init__(self, vocabulary: int, dim: int = 160, depth: int = 4, heads: int = 5) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocabulary, dim)
        self.pos = nn.Parameter(torch.randn(1, CONTEXT, dim) * 0.02)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary, bias=False)
        self.register_buffer("mask", torch.triu(torch.full((CONTEXT, CONTEXT), -1e4), 1))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.emb(input_ids) + self.pos
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(self.norm(x))


def batch(data: Tensor, size: int = 24) -> tuple[Tensor, Tensor]:
    """Random windows and the characters that follow: two int64 tensors [size, 128]."""
    starts = torch.randint(0, len(data) - CONTEXT - 1, (size,))
    rows = starts[:, None] + torch.arange(CONTEXT)
    return data[rows], data[rows + 1]


def train(net: nn.Module, data: Tensor, seconds: float) -> None:
    """AdamW with warm-up and cosine decay over the time given, bfloat16 autocast."""
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    start, step = time.time(), 0
    while (progress := (time.time() - start) / seconds) < 1:
        warm_up, decay = min(1.0, (step + 1) / 100), 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = 2e-3 * warm_up * decay + 1e-6
        x, y = batch(data)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(net(x).float().flatten(0, 1), y.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.3f}  {time.time() - start:.0f} s", flush=True)


@torch.no_grad()
def nats_per_char(net: nn.Module, text: Tensor) -> float:
    """Mean negative log likelihood over all full windows of a text."""
    count = (len(text) - 1) // CONTEXT * CONTEXT
    x, y = text[:count].view(-1, CONTEXT), text[1 : count + 1].view(-1, CONTEXT)
    parts = zip(x.split(32), y.split(32), strict=True)
    total = sum(F.cross_entropy(net(a).flatten(0, 1), b.flatten(), reduction="sum").item() for a, b in parts)
    return total / count


def export(net: nn.Module, path: Path) -> None:
    """Write float32 ONNX, opset 17, with a dynamic batch axis N and a fixed length of 128."""
    axes = {"input_ids": {0: "N"}, "logits": {0: "N"}}
    names = {"input_names": ["input_ids"], "output_names": ["logits"]}
    example = torch.zeros(1, CONTEXT, dtype=torch.long)
    torch.onnx.export(net, (example,), str(path), opset_version=17, dynamo=False, dynamic_axes=axes, **names)


def main() -> None:
    """Train, report the validation loss, export the model and its vocabulary."""
    text, out = Path(sys.argv[1]).read_text(encoding="utf-8"), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    characters = sorted(set(text))
    data = torch.tensor([characters.index(c) for c in text])
    cut = int(0.9 * len(data))
    net = CharGpt(len(characters))
    train(net, data[:cut], 60 * float(sys.argv[3]) if len(sys.argv) > 3 else 720)
    print(f"validation {nats_per_char(net.eval(), data[cut:]):.3f} nats per character", flush=True)
    export(net, out / "char_gpt.onnx")
    (out / "char_gpt.vocab.json").write_text(json.dumps(characters) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
