"""The plan is complete before the first step where inputs can be guessed, and says when to read it again where not."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from muonclip.torch import MuonClip

WIDTH, HEADS, WORDS = 12, 3, 20


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mask = None if mask is None else mask[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).flatten(2))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layers = nn.ModuleList(Attention() for _ in range(3))

    def logits(self, tokens, mask=None):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x, mask)
        return self.head(x)

    def loss(self, tokens, targets, mask=None):
        return F.cross_entropy(self.logits(tokens, mask).flatten(0, 1), targets.flatten())


class WithTargets(Body):
    def forward(self, idx, targets):
        return self.loss(idx, targets)


class WithMask(Body):
    def forward(self, input_ids, attention_mask, labels):
        assert attention_mask.dtype == torch.bool
        return self.loss(input_ids, labels, attention_mask)


class Classes(Body):
    def forward(self, tokens, label):
        return F.cross_entropy(self.logits(tokens).mean(1), label)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.attention = nn.Conv2d(3, WIDTH, 4, 4), Attention()
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, pixels, label):
        x = self.patches(pixels).flatten(2).mT
        return F.cross_entropy(self.head(self.attention(x).mean(1)), label)


class Timed(nn.Module):
    """Noise, and a time for each sequence."""

    def __init__(self):
        super().__init__()
        self.into, self.attention = nn.Linear(WIDTH, WIDTH), Attention()

    def forward(self, x, t, y):
        return self.attention(self.into(x) + torch.cos(t[:, None, None]) + y[:, None, None])


@pytest.mark.parametrize("kind", [WithTargets, WithMask, Classes, Images, Timed])
def test_attention_is_found_before_the_first_step(kind):
    with warnings.catch_warnings(action="error"):
        plan = str(MuonClip(kind()).plan)
    assert "attention projection, split by its heads' rows" in plan
    assert "again after" not in plan


def test_before_the_first_step_the_plan_asks_for_nothing_that_it_shows():
    class Odd(WithTargets):
        def forward(self, batch):
            return super().forward(batch["x"], batch["y"])

    model = Odd()
    optimizer = MuonClip(model, lr=0.0)
    before = str(optimizer.plan)
    assert "declare the attention" not in before
    assert "positional argument" not in before  # no more are tried than it takes
    assert "fused q, k, v: the first step shows its heads, read the plan again then" in before
    assert "\nread the plan again after the first step\n" in before
    tokens = torch.randint(WORDS, (2, 7))
    model({"x": tokens, "y": tokens}).backward()
    optimizer.step()
    assert "layers.0…2.qkv.weight ×3" in str(optimizer.plan)
    assert "attention projection, split by its heads' rows" in str(optimizer.plan)
    assert "again" not in str(optimizer.plan)


def test_without_the_clip_a_fused_weight_has_to_be_declared():
    """Nobody looks for its heads."""
    assert "declare the attention, or give layout=" in str(MuonClip(WithTargets(), qk_clip=None).plan)


def test_what_a_guess_makes_a_model_warn_of_is_said_where_the_guess_fits():
    class Warns(WithTargets):
        def forward(self, idx, targets):
            warnings.warn("tokens", stacklevel=1)
            return super().forward(idx, targets)

    class Refuses(Warns):
        def forward(self, idx, targets):
            super().forward(idx, targets)
            raise TypeError("no such batch")

    with pytest.warns(UserWarning, match="tokens"):
        MuonClip(Warns())
    with warnings.catch_warnings(action="error"):
        MuonClip(Refuses())
