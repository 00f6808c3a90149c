"""A small GPT on the sources of Python's standard library: AdamW against MuonClip, and their curves.

    python nanogpt.py            # a minute on two cores; nanogpt.png
    python nanogpt.py --steps 1000

Needs muonclip[torch], matplotlib, tqdm.
"""

import argparse
import inspect
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import trange

from muonclip.core import WarmupConstantCosine
from muonclip.torch import MuonClip

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 128, 4, 4, 64, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, idx, targets):
        x = self.blocks(self.tokens(idx) + self.positions.weight)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def windows(text, generator):
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1), generator=generator)
    batch = text[starts + torch.arange(LENGTH + 1)].long()
    return batch[:, :-1], batch[:, 1:]


@torch.no_grad()
def validation_loss(model, text):
    batches = torch.Generator().manual_seed(1)
    return sum(model(*windows(text, batches)).item() for _ in range(8)) / 8


def train(name, steps, text, held_out):
    torch.manual_seed(0)
    model = GPT()
    if name == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    else:
        optimizer = MuonClip(model, lr=5e-3, weight_decay=0.1)
    schedule = LambdaLR(optimizer, WarmupConstantCosine(warmup=20, constant=steps // 2, decay=steps - steps // 2 - 20))
    batches, losses = torch.Generator().manual_seed(0), []
    for step in (bar := trange(steps, desc=name)):
        loss = model(*windows(text, batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.2f}")
        if name == "MuonClip" and step == 0:
            print(optimizer.plan)  # who updates what; complete after the first step
    if name == "MuonClip":
        print(optimizer.qk_clip.report())
    return losses, validation_loss(model, held_out)


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--steps", type=int, default=200)
    steps = options.parse_args().steps
    files = sorted(Path(inspect.__file__).parent.glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)
    text, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in ("AdamW", "MuonClip"):
        losses, final = train(name, steps, text, held_out)
        smooth = torch.tensor(losses).unfold(0, 10, 1).mean(1)
        axis.plot(range(10, len(losses) + 1), smooth, label=f"{name}: {final:.3f} on held-out files")
        print(f"{name}: {final:.3f} nats per byte on held-out files")
    axis.set(xlabel="step", ylabel="training loss, nats per byte (mean of 10)")
    axis.legend()
    figure.savefig("nanogpt.png", dpi=150)


if __name__ == "__main__":
    main()
