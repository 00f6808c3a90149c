"""Linear attention with fewer key heads than value heads, a causal average by q · k, and an oracle of its heads.

No softmax: nothing tells an optimizer which rows are heads.
"""

import numpy as np
import torch
from torch import nn

from muonclip.core import MatrixLayout

WIDTH, KEY_HEADS, VALUE_HEADS, KEY, VALUE = 12, 2, 4, 3, 5
SHARE = VALUE_HEADS // KEY_HEADS * VALUE  # rows of the values of a key head
LAYOUTS = {
    "*.q": KEY_HEADS,
    "*.k": KEY_HEADS,
    "*.v": VALUE_HEADS,
    "*.qkv": MatrixLayout(
        blocks=(KEY, KEY, SHARE), heads=(KEY_HEADS, KEY_HEADS, VALUE_HEADS), repeats=KEY_HEADS
    ),  # as Qwen3-Next fuses: of each key head its q, its k, and the v that it serves
}


class LinearAttention(nn.Module):
    def __init__(self, fused=False):
        super().__init__()
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(WIDTH, KEY_HEADS * (2 * KEY + SHARE), bias=False)
        else:
            self.q, self.k = (nn.Linear(WIDTH, KEY_HEADS * KEY, bias=False) for _ in range(2))
            self.v = nn.Linear(WIDTH, VALUE_HEADS * VALUE, bias=False)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2)
        self.o = nn.Linear(VALUE_HEADS * VALUE, WIDTH, bias=False)

    def forward(self, x):
        x = self.conv(x.mT)[..., : x.shape[1]].mT
        if self.fused:
            q, k, v = self.qkv(x).unflatten(-1, (KEY_HEADS, -1)).split((KEY, KEY, SHARE), -1)
            v = v.unflatten(-1, (-1, VALUE)).flatten(2, 3)
        else:
            q, k = (m(x).unflatten(-1, (KEY_HEADS, KEY)) for m in (self.q, self.k))
            v = self.v(x).unflatten(-1, (VALUE_HEADS, VALUE))
        q, k = (each.repeat_interleave(VALUE_HEADS // KEY_HEADS, 2) for each in (q, k))
        weights = torch.einsum("bihd,bjhd->bhij", q, k).tril()
        return self.o(torch.einsum("bhij,bjhv->bihv", weights, v).flatten(2))


class Model(nn.Module):
    def __init__(self, fused=False):
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList([LinearAttention(fused), LinearAttention(fused)])
        self.lm_head = nn.Linear(WIDTH, 11, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(x)

    def loss(self, seed):
        tokens = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(seed))
        return nn.functional.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def rows_of_heads(projection):
    """The rows of each head of a projection, by counting them."""
    if projection in ("q", "k"):
        return [np.arange(KEY) + KEY * head for head in range(KEY_HEADS)]
    if projection == "v":
        return [np.arange(VALUE) + VALUE * head for head in range(VALUE_HEADS)]
    period, ratio = 2 * KEY + SHARE, VALUE_HEADS // KEY_HEADS
    q = [np.arange(KEY) + period * head for head in range(KEY_HEADS)]
    v = [np.arange(VALUE) + period * (h // ratio) + 2 * KEY + VALUE * (h % ratio) for h in range(VALUE_HEADS)]
    return [*q, *(rows + KEY for rows in q), *v]
