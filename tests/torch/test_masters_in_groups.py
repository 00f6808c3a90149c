"""Engines for half precision put masters into an optimizer's groups and copy them to the parameters after each step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from muonclip.core.update_rule import MuonRule
from muonclip.torch import MuonClip, QKClip

TAU, STEPS = 0.5, 4


class Attention(nn.Module):
    """Its inputs are no tensor and cannot be guessed: the first forward shows that one weight makes q, k and v."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, parts):
        q, k, v = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in self.qkv(parts["x"]).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def data(step):
    return {"x": 8 * torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(step))}


def put_masters(optimizer):
    """Parameter and master, in pairs. (Of the same dtype, so that nothing is rounded and the ends can be compared.)"""
    pairs = []
    for group in optimizer.param_groups:
        masters = [each.detach().clone().requires_grad_() for each in group["params"]]
        pairs += zip(group["params"], masters, strict=True)
        group["params"] = masters
    return pairs


def train(model, optimizer, clip, pairs):
    clipped = []
    for step in range(STEPS):
        model(data(step)).square().mean().backward()
        for parameter, master in pairs:
            master.grad = parameter.grad
        optimizer.step()
        with torch.no_grad():
            for parameter, master in pairs:
                parameter.copy_(master)
        for parameter in model.parameters():
            parameter.grad = None
        clipped.append(clip.report().clipped_heads)
    return clipped


def with_muonclip(model, **options):
    optimizer = MuonClip(model, lr=5e-3, tau=TAU, **options)
    return optimizer, optimizer.qk_clip


def with_attached_clip(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    clip = QKClip(model, tau=TAU)
    clip.attach(optimizer)
    return optimizer, clip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "make",
    [
        with_muonclip,
        lambda model: with_muonclip(model, per_head=True),
        lambda model: with_muonclip(model, rest=torch.optim.NAdam, update="muown"),
        with_attached_clip,
    ],
    ids=["muonclip", "per head", "another rest", "attached"],
)
def test_masters_end_where_the_parameters_alone_do(make):
    alone, model = Attention(), Attention()
    expected = train(alone, *make(alone), [])
    assert sum(expected) > 3
    optimizer, clip = make(model)
    pairs = put_masters(optimizer)
    assert train(model, optimizer, clip, pairs) == expected
    assert all(map(torch.equal, model.parameters(), alone.parameters()))


def test_a_rule_s_state_follows_the_rows_that_are_scaled():
    factors = []

    class Following(MuonRule):
        def rescale(self, state, factor):
            factors.append(factor)
            return state

    class FollowingClip(MuonClip):
        rule = Following()

    model = Attention()
    optimizer = FollowingClip(model, lr=5e-3, tau=TAU)
    clipped = train(model, optimizer, optimizer.qk_clip, put_masters(optimizer))
    by_step = [factors[3 * step : 3 * step + 3] for step in range(STEPS)]  # of q, k and v
    assert len(factors) == 3 * STEPS
    assert [any(bool((each < 1).any()) for each in three) for three in by_step] == [count > 0 for count in clipped]
    assert any(clipped)


def test_a_master_of_another_model_is_left_alone():
    """Two models of one kind have parameters of the same names and shapes."""
    one, other = Attention(), Attention()
    optimizer, clip = with_muonclip(one)
    second, _ = with_muonclip(other)
    pairs, others = put_masters(optimizer), put_masters(second)
    before = [master.detach().clone() for _, master in others]
    assert sum(train(one, optimizer, clip, pairs)) > 3
    assert all(torch.equal(master, value) for (_, master), value in zip(others, before, strict=True))


def test_groups_whose_parameters_are_fewer_are_not_taken_for_masters():
    """An engine that leaves frozen parameters out moves the others up, to places of other parameters."""
    model = Attention()
    optimizer, clip = with_attached_clip(model)
    pairs = put_masters(optimizer)
    group = optimizer.param_groups[0]
    stray = torch.zeros_like(pairs[0][1]).requires_grad_() + 1
    group["params"] = [stray.detach(), *group["params"][1:-1]]
    for parameter, master in pairs:
        parameter.grad = master.grad = None
    model(data(0)).square().mean().backward()
    optimizer.step()
    assert clip.report().clipped_heads
    assert torch.equal(group["params"][0], torch.ones_like(group["params"][0]))
