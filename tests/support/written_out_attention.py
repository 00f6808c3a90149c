"""One attention that is written out, and what a dense float64 oracle says of its logits."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from muonclip.torch import QKClip

WIDTH, HEADS, HEAD, LENGTH, TAU = 20, 4, 6, 7, 0.5
SCALE = HEAD**-0.5
FORBIDDEN = ~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
CHECKERED = (
    torch.arange(LENGTH)[:, None] + torch.arange(LENGTH)
) % 2 == 0  # of which a shift allows all that it forbids


class Attention(nn.Module):
    """`attend(q, k, v, self)` of heads [B, H, T, d], behind it a projection as in a model."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD, bias=False) for _ in range(3))
        self.out = nn.Linear(HEADS * HEAD, WIDTH)
        self.sink = nn.Parameter(torch.full((HEADS, 1, 1), 50.0))
        self.memory = nn.Linear(WIDTH, HEADS * HEAD, bias=False)
        with torch.no_grad():
            for projection, factors in (
                (self.q, torch.linspace(1, 9, HEADS)),
                (self.memory, torch.linspace(3, 1, HEADS)),
            ):
                projection.weight.mul_(factors.repeat_interleave(HEAD)[:, None])

    def heads(self, x):
        return [m(x).unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for m in (self.q, self.k, self.v, self.memory)]

    def forward(self, x):
        q, k, v, self.m = self.heads(x)
        y = self.attend(q, k, v, self)
        return self.out(y.transpose(1, 2).flatten(2)) if y.shape == v.shape else y


def maxima(model, x, forbidden=None, scale=SCALE, keys="k"):
    """Dense float64 maxima [heads] over the allowed pairs."""
    with torch.no_grad():
        q, k, _, m = (t.double() for t in model.heads(x))
    k = {"k": k, "m": m, "km": torch.cat([k, m], -2), "mk": torch.cat([m, k], -2)}[keys]
    scores = torch.as_tensor(scale, dtype=torch.float64) * (q @ k.mT)
    if forbidden is not None:
        scores = scores.masked_fill(forbidden, -math.inf)
    return scores.amax((0, 2, 3)).numpy()


def check(attend, x, forbidden=None, scale=SCALE, keys="k", names=("",)):
    """`names`: of the attentions that are found, which have the heads in their order."""
    model = Attention(attend)
    clip = QKClip(model, tau=TAU, observe="always", example_inputs=x)
    before = maxima(model, x, forbidden, scale, keys)
    model(x).sum().backward()
    clip.step()
    layers = clip.report().layers
    assert tuple(layers) == names
    np.testing.assert_allclose(np.concatenate([layer.max_logits for layer in layers.values()]), before, rtol=1e-5)
    np.testing.assert_allclose(maxima(model, x, forbidden, scale, keys), np.minimum(before, TAU), rtol=1e-5)
    if forbidden is not None:
        assert not np.allclose(before, maxima(Attention(attend), x, None, scale, keys), rtol=1e-3)


def refused(attend, reason, x):
    with pytest.raises(ValueError, match=f"its logits {reason}"):
        QKClip(Attention(attend), example_inputs=x)


def product(q, k):
    return q @ k.mT * SCALE
