"""torch.compile around the step of an optimizer, and around a function that is a whole step of training."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from muonclip.torch import MuonClip, QKClip

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # the compiler looks at it
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]
WIDTH, HEADS, TAU = 16, 2, 0.5


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def data(seed):
    return 8 * 2**seed * torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def with_muonclip(model):
    optimizer = MuonClip(model, lr=5e-3, tau=TAU)
    return optimizer, optimizer.qk_clip


def with_attached_clip(model):
    optimizer, clip = torch.optim.SGD(model.parameters(), lr=1e-6), QKClip(model, tau=TAU)
    clip.attach(optimizer)
    return optimizer, clip


def train(make, compiled):
    """The losses and clipped heads of three steps, and the weights after them."""
    torch._dynamo.reset()
    model = Attention()
    optimizer, clip = make(model)
    step = torch.compile(optimizer.step, backend="eager") if compiled == "step" else optimizer.step

    def train_step(x):
        loss = model(x).square().mean()
        loss.backward()
        step()
        optimizer.zero_grad()
        return loss.detach()

    if compiled == "whole":
        train_step = torch.compile(train_step, backend="eager")
    seen = [(train_step(data(seed)).item(), clip.report().clipped_heads) for seed in range(3)]
    return seen, [each.detach().clone() for each in model.parameters()]


@pytest.mark.parametrize("make", [with_muonclip, with_attached_clip])
def test_a_compiled_step_and_a_compiled_step_of_training_end_at_the_same_bits(make):
    seen, weights = train(make, None)
    assert all(clipped for _, clipped in seen)
    for compiled in ("step", "whole"):
        seen_compiled, weights_compiled = train(make, compiled)
        assert seen_compiled == seen, compiled
        assert all(map(torch.equal, weights_compiled, weights)), compiled


def test_a_step_that_must_be_one_graph_is_refused_before_anything_moves():
    model = Attention()
    optimizer, clip = with_muonclip(model)
    before = [each.detach().clone() for each in model.parameters()]
    model(data(0)).square().mean().backward()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_step_uncompiled"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.step()
    assert clip.report().clipped_heads
