"""Small models of images, whose libraries the tests do not install, written as these write them.

CoAtNet (2106.04803; timm), DiT (2212.09748), the U-Net of Stable Diffusion (2112.10752), SD3 (2403.03206) and Flux
(diffusers): what makes queries, keys and logits is theirs, block by block; sizes, depths and embeddings are small.

Shapes: B images, C channels, T tokens, H heads of width d.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, HEAD = 24, 4, 6


def heads(x):
    """[B, T, H · d] → [B, H, T, d]"""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def joined(y):
    return y.transpose(1, 2).flatten(2)


def modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale[:, None]) + shift[:, None]


def mlp(width=WIDTH):
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def times(t, width=WIDTH):
    angles = t[:, None] * torch.exp(-torch.arange(width // 2) / width)
    return torch.cat([angles.cos(), angles.sin()], -1)


class OffsetAttention(nn.Module):
    """Attention over an image by 1 × 1 convolutions, with a learned bias of each offset."""

    def __init__(self, side):
        super().__init__()
        self.norm = nn.GroupNorm(1, WIDTH)
        self.qkv, self.out = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.bias = nn.Parameter(torch.randn(HEADS, (2 * side - 1) ** 2))
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        y, x = ((c.flatten()[:, None] - c.flatten() + side - 1) for c in (y, x))
        self.register_buffer("offsets", y * (2 * side - 1) + x)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (HEADS, -1)).mT.chunk(3, -1)  # head by head
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[:, self.offsets])
        return self.out(y.mT.flatten(1, 2).unflatten(-1, x.shape[-2:]))


class CoAtNet(nn.Module):
    """A convolution with a depthwise one inside, then attention."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1)
        self.convolutions = nn.Sequential(
            nn.Conv2d(WIDTH, 2 * WIDTH, 1), nn.BatchNorm2d(2 * WIDTH), nn.GELU(),
            nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1, groups=2 * WIDTH), nn.GELU(), nn.Conv2d(2 * WIDTH, WIDTH, 1),
        )  # fmt: skip
        self.attention, self.head = OffsetAttention(side=4), nn.Linear(WIDTH, 5)

    def forward(self, images):
        x = self.stem(images)
        x = x + self.convolutions(x)
        x = x + self.attention(x)
        return self.head(x.mean((2, 3)))


class DiTBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.qkv, self.out, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), mlp()

    def forward(self, x, condition):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(condition).chunk(6, -1)
        q, k, v = map(heads, self.qkv(modulated(x, shift, scale)).chunk(3, -1))
        x = x + gate[:, None] * self.out(joined(F.scaled_dot_product_attention(q, k, v)))
        return x + gate_mlp[:, None] * self.mlp(modulated(x, shift_mlp, scale_mlp))


class DiT(nn.Module):
    """Norms that a label and a time shift and scale, and gates that begin at zero."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.time, self.label = mlp(), nn.Embedding(5, WIDTH)
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(2))
        self.out = nn.Linear(WIDTH, 48)
        for block in self.blocks:
            nn.init.zeros_(block.modulation[1].weight)

    def forward(self, images, t, labels):
        x = self.patches(images).flatten(2).mT
        condition = self.time(times(t)) + self.label(labels)
        for block in self.blocks:
            x = block(x, condition)
        return self.out(x)


class CrossAttention(nn.Module):
    """To the sequence itself, or to a text of another width."""

    def __init__(self, context_width=WIDTH):
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_width, WIDTH, bias=False) for _ in range(2))
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = heads(self.to_q(x)), heads(self.to_k(context)), heads(self.to_v(context))
        return self.to_out(joined(F.scaled_dot_product_attention(q, k, v)))


class UNetBlock(nn.Module):
    """A residual block of convolutions, then a transformer of which the second attention is to the text."""

    def __init__(self, channels):
        super().__init__()
        self.into, self.of_time = nn.Conv2d(channels, WIDTH, 3, padding=1), nn.Linear(WIDTH, WIDTH)
        self.norm, self.conv = nn.GroupNorm(4, WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.skip = nn.Conv2d(channels, WIDTH, 1)
        self.proj_in, self.proj_out = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.attn1, self.attn2, self.mlp = CrossAttention(), CrossAttention(context_width=14), mlp()

    def forward(self, x, time, text):
        y = self.into(x) + self.of_time(F.silu(time))[..., None, None]
        x = self.skip(x) + self.conv(F.silu(self.norm(y)))
        tokens = self.proj_in(x).flatten(2).mT
        tokens = tokens + self.attn1(self.norms[0](tokens))
        tokens = tokens + self.attn2(self.norms[1](tokens), text)
        tokens = tokens + self.mlp(self.norms[2](tokens))
        return x + self.proj_out(tokens.mT.unflatten(-1, x.shape[-2:]))


class UNet(nn.Module):
    """Down, the middle, and up with what was there on the way down."""

    def __init__(self):
        super().__init__()
        self.time = mlp()
        self.down, self.middle, self.up = UNetBlock(3), UNetBlock(WIDTH), UNetBlock(2 * WIDTH)
        self.out = nn.Conv2d(WIDTH, 3, 3, padding=1)

    def forward(self, images, t, text):
        time = self.time(times(t))
        x = self.down(images, time, text)
        y = F.interpolate(self.middle(F.avg_pool2d(x, 2), time, text), scale_factor=2)
        return self.out(self.up(torch.cat([x, y], 1), time, text))


class Stream(nn.Module):
    """One of two kinds of tokens with weights of its own, that meet in the attention. `normed`: queries and keys have
    RMS norms, as Flux has them."""

    def __init__(self, *, normed):
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(HEAD) if normed else nn.Identity() for _ in range(2))
        self.mlp = mlp()

    def qkv(self, x, condition):
        shift, scale, self.gate = self.modulation(F.silu(condition)).chunk(3, -1)
        x = modulated(x, shift, scale)
        return self.norm_q(heads(self.to_q(x))), self.norm_k(heads(self.to_k(x))), heads(self.to_v(x))

    def after(self, x, y):
        x = x + self.gate[:, None] * self.to_out(joined(y))
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]))


class JointBlock(nn.Module):
    def __init__(self, *, normed=False):
        super().__init__()
        self.image, self.text = Stream(normed=normed), Stream(normed=normed)

    def forward(self, image, text, condition, rotate=lambda x: x):
        both = zip(self.text.qkv(text, condition), self.image.qkv(image, condition), strict=True)
        q, k, v = (torch.cat(parts, 2) for parts in both)
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v)
        of_text, of_image = y.split([text.shape[1], image.shape[1]], 2)
        return self.image.after(image, of_image), self.text.after(text, of_text)


class SD3(nn.Module):
    normed = False

    def __init__(self):
        super().__init__()
        self.patches, self.text, self.time = nn.Conv2d(3, WIDTH, 4, stride=4), nn.Linear(14, WIDTH), mlp()
        self.blocks = nn.ModuleList(JointBlock(normed=self.normed) for _ in range(2))
        self.out = nn.Linear(WIDTH, 48)

    def begin(self, images, t, text):
        return self.patches(images).flatten(2).mT, self.text(text), self.time(times(t))

    def forward(self, images, t, text):
        image, text, condition = self.begin(images, t, text)
        for block in self.blocks:
            image, text = block(image, text, condition)
        return self.out(torch.cat([text, image], 1))


class SingleBlock(nn.Module):
    """Attention and perceptron side by side, of one fused projection."""

    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)
        self.into, self.out = nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.norm_q, self.norm_k = (nn.RMSNorm(HEAD) for _ in range(2))

    def forward(self, x, condition, rotate):
        shift, scale, gate = self.modulation(F.silu(condition)).chunk(3, -1)
        qkv, hidden = self.into(modulated(x, shift, scale)).split([3 * WIDTH, 2 * WIDTH], -1)
        q, k, v = map(heads, qkv.chunk(3, -1))
        y = F.scaled_dot_product_attention(rotate(self.norm_q(q)), rotate(self.norm_k(k)), v)
        return x + gate[:, None] * self.out(torch.cat([joined(y), F.gelu(hidden)], -1))


class Flux(SD3):
    normed = True

    def __init__(self):
        super().__init__()
        self.blocks = self.blocks[:1]
        self.single = SingleBlock()

    def forward(self, images, t, text):
        image, text, condition = self.begin(images, t, text)
        image, text = self.blocks[0](image, text, condition, rotated)
        return self.out(self.single(torch.cat([text, image], 1), condition, rotated))


def rotated(x):
    angles = torch.arange(x.shape[-2])[:, None] * torch.exp(-torch.arange(HEAD // 2))
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1).flatten(-2)


INPUTS = {
    "CoAtNet": {"images": (3, 8, 8)},
    "DiT": {"images": (3, 8, 8), "t": (), "labels": ()},
    "UNet": {"images": (3, 4, 4), "t": (), "text": (5, 14)},
    "SD3": {"images": (3, 8, 8), "t": (), "text": (5, 14)},
    "Flux": {"images": (3, 8, 8), "t": (), "text": (5, 14)},
}
"""The arguments of each model, and their shapes behind the batch."""


def argument(name, shape, batch=2):
    """Make one."""
    if name == "labels":
        return torch.arange(batch) % 5
    return torch.linspace(0, math.pi, batch) if name == "t" else torch.randn(batch, *shape)
