"""Queries with five axes, whose heads may be on any of the leading ones."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from muonclip.torch import QKClip

WIDTH, HEADS, HEAD, BATCH = 20, 4, 6, 2


class Windows(nn.Module):
    """Attention in windows of `length` tokens, as of Hiera. `heads_first`: [B, heads, windows, T, d]; else the windows
    are before the heads. `mask(logits)`: what is added to them, bool for a kernel."""

    def __init__(self, windows, length, *, kernel, heads_first=True, mask=None, relative=False):
        super().__init__()
        self.windows, self.kernel, self.heads_first, self.mask = windows, kernel, heads_first, mask
        self.qkv, self.o = nn.Linear(WIDTH, 3 * HEADS * HEAD), nn.Linear(HEADS * HEAD, WIDTH)
        self.positions = nn.Parameter(torch.randn(length, HEAD)) if relative else None

    def heads(self, x):
        y = self.qkv(x).unflatten(1, (-1, self.windows)).unflatten(-1, (3, HEADS, HEAD))  # B, T, windows, 3, heads, d
        return y.permute((3, 0, 4, 2, 1, 5) if self.heads_first else (3, 0, 2, 4, 1, 5)).unbind(0)

    def added(self, q):
        if self.positions is not None:
            return q @ self.positions.T
        return None if self.mask is None else torch.zeros(self.mask.shape, dtype=q.dtype).masked_fill(~self.mask, -1e9)

    def logits(self, x):
        q, k, _ = self.heads(x)
        added = self.added(q)
        return q @ k.mT / math.sqrt(HEAD) + (0 if added is None else added)

    def forward(self, x):
        q, k, v = self.heads(x)
        if self.kernel:
            mask = self.mask if self.positions is None else self.added(q)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = self.logits(x).softmax(-1) @ v
        y = y.permute((0, 3, 2, 1, 4) if self.heads_first else (0, 3, 1, 2, 4))  # B, T, windows, heads, d
        return self.o(y.flatten(-2).flatten(1, 2))


def maxima(module, x):
    with torch.no_grad():
        logits = copy.deepcopy(module).double().logits(x.double())
    return logits.amax((0, 2, 3, 4) if module.heads_first else (0, 1, 3, 4))


def mask_of(*leading):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(*leading, 5, 5, generator=generator) < 0.4


class WindowsAfterTheWhole(Windows):
    """The first window attends to all, with four axes, as the first block of BigBird."""

    def forward(self, x):
        q, k, v = self.heads(x)
        q, k, v = 3 * q[:, :, 0], k.flatten(2, 3), v.flatten(2, 3)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return super().forward(x) + self.o(y).mean()


def test_heads_of_four_axes_stay_where_they_are():
    torch.manual_seed(0)
    module, x = WindowsAfterTheWhole(3, 5, kernel=True), torch.randn(BATCH, 15, WIDTH)

    def both():
        with torch.no_grad():
            q, k, _ = (t.double() for t in module.heads(x))
        whole = 3 * (q[:, :, 0] @ k.flatten(2, 3).mT).amax((0, 2, 3)) / math.sqrt(HEAD)
        return torch.maximum(whole, maxima(module, x))

    before = both()
    clip = QKClip(module, tau=float(before.median()), observe="always", example_inputs=x)
    module(x)
    clip.step()
    torch.testing.assert_close(clip.report().layers[""].max_logits.double(), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both(), before.clamp(max=clip.tau), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(
    ("windows", "options"),
    [
        (3, {}),
        (HEADS, {}),  # as many as heads
        (BATCH, {}),
        (1, {}),
        (3, {"heads_first": False}),
        (3, {"mask": mask_of()}),
        (HEADS, {"mask": mask_of(HEADS)}),  # of windows
        (3, {"mask": mask_of(HEADS, 1)}),
        (3, {"mask": mask_of(BATCH, HEADS, 3)}),
        (3, {"relative": True}),
    ],
)
def test_each_head_is_held_at_tau(windows, options, kernel):
    torch.manual_seed(0)
    module, x = Windows(windows, 5, kernel=kernel, **options), torch.randn(BATCH, 5 * windows, WIDTH)
    before = maxima(module, x)
    clip = QKClip(module, tau=float(before.median()), observe="always", example_inputs=x)
    module(x)
    clip.step()
    torch.testing.assert_close(clip.report().layers[""].max_logits.double(), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maxima(module, x), before.clamp(max=clip.tau), rtol=1e-5, atol=1e-5)
