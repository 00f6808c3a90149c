"""Small attentions of every kind, and a dense probe that shares no code with the library.

The model width never equals heads · head width, so that a factor applied along the wrong axis cannot go unnoticed.
Biases are everywhere. H query heads, G key heads.
"""

import math

import numpy as np
import torch
from torch import nn

from muonclip.torch import HeadRows, MaxLogits, QKProjection, attention

WIDTH, HEADS, HEAD = 10, 4, 6
NOPE, ROPE, VALUE, LATENT = 5, 3, 7, 9
KINDS = ("mha", "gqa", "mqa", "mla", "mla_full_rank_q", "fused_blocks", "fused_interleaved", "transposed")


class Transposed(nn.Module):
    """GPT-2's Conv1D: weight [in, out]."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_in, fan_out) / math.sqrt(fan_in))
        self.bias = nn.Parameter(torch.randn(fan_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class TinyAttention(nn.Module):
    def __init__(self, kind="mha", heads=HEADS):
        super().__init__()
        self.kind, self.heads = kind, heads
        self.groups = {"gqa": 2, "mqa": 1}.get(kind, heads)
        self.max_logits = MaxLogits(heads)
        if kind.startswith("mla"):
            self.full_rank_q = kind == "mla_full_rank_q"
            self.q_down = nn.Linear(WIDTH, LATENT)
            self.q_up = nn.Linear(WIDTH if self.full_rank_q else LATENT, heads * (NOPE + ROPE))
            self.kv_down = nn.Linear(WIDTH, LATENT)
            self.kv_up = nn.Linear(LATENT, heads * (NOPE + VALUE))
            self.k_rope = nn.Linear(WIDTH, ROPE)
        elif kind.startswith("fused"):
            self.qkv = nn.Linear(WIDTH, 3 * heads * HEAD)
        elif kind == "transposed":
            self.qkv = Transposed(WIDTH, 3 * heads * HEAD)
        else:
            self.q = nn.Linear(WIDTH, heads * HEAD)
            self.k = nn.Linear(WIDTH, self.groups * HEAD)
            self.v = nn.Linear(WIDTH, self.groups * HEAD)
        self.out = nn.Linear(heads * (VALUE if kind.startswith("mla") else HEAD), WIDTH)

    def qk_projection(self):
        heads, statistic = self.heads, self.max_logits
        if self.kind.startswith("mla"):
            widths = dict(qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=VALUE)
            return QKProjection.mla(q=self.q_up, kv=self.kv_up, num_heads=heads, max_logits=statistic, **widths)
        if self.kind in ("fused_blocks", "transposed", "fused_interleaved"):
            interleaved, axis = self.kind == "fused_interleaved", int(self.kind == "transposed")
            start, stride = (HEAD, 3 * HEAD) if interleaved else (heads * HEAD, None)
            rows = [(HeadRows(self.qkv, heads, HEAD, i * start, stride, axis=axis),) for i in range(3)]
            return QKProjection("mha", heads, statistic, query=rows[0], key=rows[1], value=rows[2])
        parts = dict(q=self.q, k=self.k, v=self.v, num_heads=heads, max_logits=statistic)
        return QKProjection.mha(**parts) if self.kind == "mha" else QKProjection.gqa(num_kv_heads=self.groups, **parts)

    def qkv_of(self, x):
        """q [B, H, T, d], k [B, G, T, d], v [B, G, T, dv]."""
        heads = self.heads

        def split(y, n):
            return y.unflatten(-1, (n, -1)).transpose(1, 2)

        if self.kind.startswith("mla"):
            q = split(self.q_up(x if self.full_rank_q else self.q_down(x)), heads)
            k_nope, v = split(self.kv_up(self.kv_down(x)), heads).split([NOPE, VALUE], -1)
            k_rope = self.k_rope(x)[:, None].expand(-1, heads, -1, -1)
            return q, torch.cat([k_nope, k_rope], -1), v
        if self.kind == "fused_interleaved":
            return split(self.qkv(x), heads).split(HEAD, -1)
        if self.kind in ("fused_blocks", "transposed"):
            return tuple(split(part, heads) for part in self.qkv(x).chunk(3, -1))
        return split(self.q(x), heads), split(self.k(x), self.groups), split(self.v(x), self.groups)

    def forward(self, x, **masks):
        masks = masks or {"is_causal": True}
        y = attention(*self.qkv_of(x), max_logits=self.max_logits, **masks)
        return self.out(y.transpose(1, 2).flatten(2))


class UndeclaredAttention(nn.Module):
    """Calls the host's attention and declares nothing."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD) for _ in range(3))
        self.out = nn.Linear(HEADS * HEAD, WIDTH)

    def heads(self, projection, x):
        return projection(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2)

    def forward(self, x):
        q, k, v = (self.heads(each, x) for each in (self.q, self.k, self.v))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def maxima(self, x):
        """[H], from the dense logits."""
        with torch.no_grad():
            return dense_max_logits(self.heads(self.q, x), self.heads(self.k, x))


class TinyModel(nn.Module):
    """Embedding, two attentions with residuals, norm, head; `loss(tokens)` is a scalar."""

    def __init__(self, kind="mha", vocabulary=13):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        self.layers = nn.ModuleList([TinyAttention(kind) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(self.norm(x))

    def loss(self, tokens):
        logits = self(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def dense_max_logits(q, k, allowed=None, scale=None):
    """[H], one head at a time in float64 NumPy. `allowed`: bool [B, T, T] (None: causal)."""
    q, k = (np.asarray(t.detach(), dtype=np.float64) for t in (q, k))
    batch, heads, length, width = q.shape
    allowed = np.tri(length, dtype=bool)[None].repeat(batch, 0) if allowed is None else np.asarray(allowed)
    scale = 1 / math.sqrt(width) if scale is None else scale
    maxima = []
    for h in range(heads):
        key = k[:, h // (heads // k.shape[1])]
        logits = scale * np.einsum("bid,bjd->bij", q[:, h], key)
        maxima.append(logits[allowed].max() if allowed.any() else -np.inf)
    return np.array(maxima)


def head_rows(module, head):
    """Copies of everything the clip may scale for one head."""
    projection = module.qk_projection()
    return [
        rows.of(parameter.detach(), axis).select(axis, head).clone()
        for rows in projection.scaled_parts()
        for parameter, axis in rows.parameters()
    ]
