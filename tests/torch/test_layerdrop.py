"""A step need not reach every attention: what was not run has no gradient, or one of zero, and nothing to clip."""

import copy
from contextlib import nullcontext, suppress

import pytest
import torch
import torch.distributed as dist
from tiny_attention import WIDTH, TinyAttention, UndeclaredAttention, dense_max_logits
from torch import nn

from muonclip.torch import MuonClip, QKClip
from muonclip.torch.clip import qk_clip as qk_clip_module

TAU = 0.05


class Dropping(nn.Module):
    """`dropped`: the layers that the next forward leaves out."""

    def __init__(self, kind):
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(3))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.dropped = frozenset()
        self.inputs = {}

    def forward(self, x):
        self.inputs = {}
        for index, layer in enumerate(self.layers):
            if index not in self.dropped:
                self.inputs[index] = x.detach()
                x = x + layer(x)
        return self.head(x)


def muonclip(model):
    clip = QKClip(model, tau=TAU, observe="always")
    return MuonClip(model, lr=1e-12, weight_decay=0.0, qk_clip=clip).step, clip


def by_hand(model):
    clip, optimizer = QKClip(model, tau=TAU, observe="always"), torch.optim.SGD(model.parameters(), lr=0.0)
    return lambda: (optimizer.step(), clip.step()), clip


def attached(model):
    clip, optimizer = QKClip(model, tau=TAU, observe="always"), torch.optim.SGD(model.parameters(), lr=1e-12)
    clip.attach(optimizer)
    return optimizer.step, clip


def training(make, kind=UndeclaredAttention):
    torch.manual_seed(0)
    model = Dropping(kind).double()
    return model, *make(model)


def backward(model):
    model(torch.randn(2, 7, WIDTH, dtype=torch.float64)).square().mean().backward()


def loudest(layer, x):
    with torch.no_grad():
        maxima = dense_max_logits(*layer.qkv_of(x)[:2]) if isinstance(layer, TinyAttention) else layer.maxima(x)
        return float(maxima.max())


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("waits", [True, False], ids=["", "accelerator"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (muonclip, UndeclaredAttention),
        (muonclip, TinyAttention),
        (by_hand, UndeclaredAttention),
        (attached, UndeclaredAttention),
    ],
)
@pytest.mark.parametrize("plan", [[(), (1,), (0, 2), (0, 1, 2), (2,), ()], [(1,), (0,), ()]], ids=["later", "at first"])
def test_a_step_need_not_reach_every_attention(plan, make, kind, waits, set_to_none, monkeypatch):
    if not waits:
        monkeypatch.setattr(qk_clip_module, "_may_wait_for", lambda device: False)
    model, step, clip = training(make, kind)
    for dropped in plan:
        model.dropped = frozenset(dropped)
        with torch.no_grad():
            for layer in model.layers:
                layer.q.weight.mul_(5)
        before = [copy.deepcopy(layer.state_dict()) for layer in model.layers]
        backward(model)
        step()
        for index, layer in enumerate(model.layers):
            if index in dropped:
                for weight, old in zip(layer.state_dict().values(), before[index].values(), strict=True):
                    torch.testing.assert_close(weight, old, rtol=0, atol=1e-10)
            else:
                assert loudest(layer, model.inputs[index]) == pytest.approx(TAU, rel=1e-6)
        report = clip.report()
        assert report.clipped_heads > 0 or len(dropped) == len(model.layers)
        seen = [bool(layer.max_logits.isfinite().any()) for layer in report.layers.values()]
        assert seen == [index not in dropped for index in range(3)]
        model.zero_grad(set_to_none=set_to_none)


@pytest.mark.parametrize("make", [muonclip, by_hand, attached])
def test_a_gradient_without_an_observation_is_an_error(make):
    model, step, clip = training(make)
    backward(model)
    step()
    model.zero_grad(set_to_none=False)
    model.dropped = frozenset({2})
    backward(model)
    model.layers[2].k.bias.grad[3] = 1e-300
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"observed no forward of layers\.2 since"):
        step()
    if make is not by_hand:
        assert all(map(torch.equal, model.state_dict().values(), before.values()))
    assert clip.report().steps == 1


def test_on_an_accelerator_it_is_an_error_of_the_next_step(monkeypatch):
    monkeypatch.setattr(qk_clip_module, "_may_wait_for", lambda device: False)
    model, step, _ = training(muonclip)
    backward(model)
    step()
    model.zero_grad()
    model.dropped = frozenset({2})
    backward(model)
    model.layers[2].q.weight.grad = torch.ones_like(model.layers[2].q.weight)
    step()
    with pytest.raises(RuntimeError, match=r"observed no forward of layers\.2 since"):
        step()


def test_by_hand_it_is_an_error_to_discard_the_gradients_before_the_clip():
    """Nobody knows then what had one."""
    model, _, clip = training(by_hand)
    backward(model)
    clip.step()
    model.dropped = frozenset({0})
    backward(model)
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"observed no forward of layers\.0 since"):
        clip.step()


def test_what_a_skipped_step_left_does_not_fail_one_that_drops_the_layer():
    model, step, _ = training(muonclip)
    backward(model)
    step()
    with torch.no_grad():
        weight = model.layers[1].q.weight.clone()
        model.layers[1].q.weight.fill_(float("inf"))
    backward(model)  # a GradScaler skips the step
    with torch.no_grad():
        model.layers[1].q.weight.copy_(weight)
    model.zero_grad(set_to_none=False)
    model.dropped = frozenset({1})
    backward(model)
    step()


def drop_on(model, dropped):
    model.zero_grad(set_to_none=False)
    model.dropped = frozenset(dropped)
    backward(model)


@pytest.mark.parametrize(
    ("dropped_here", "dropped_there", "gradient_there", "error"),
    [((1,), (), False, False), ((1,), (1,), False, False), ((0, 1, 2), (1,), False, False), ((1,), (1,), True, True)],
)
def test_a_gradient_or_an_observation_on_any_rank_counts(
    dropped_here, dropped_there, gradient_there, error, monkeypatch
):
    """Two ranks, of which each gives the other its vector."""
    sent = []
    monkeypatch.setattr(QKClip, "_group", lambda self: "both")
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op, group: sent.append(tensor.clone()))
    (here, step, clip), (there, _, other) = (training(muonclip) for _ in range(2))
    for model, dropped, of_rank in ((here, dropped_here, clip), (there, dropped_there, other)):
        drop_on(model, ())
        of_rank.reset()
        drop_on(model, dropped)
    if gradient_there:
        there.layers[1].q.weight.grad[0, 0] = 1.0
    with suppress(RuntimeError):  # the vector was sent by then
        other.before_update()
    vector = sent.pop()

    def give(tensor, op, group):
        if tensor.shape == vector.shape:  # before it, they compare what they are to agree on
            tensor.copy_(torch.maximum(tensor, vector))

    monkeypatch.setattr(dist, "all_reduce", give)
    with pytest.raises(RuntimeError, match=r"observed no forward of layers\.1 since") if error else nullcontext():
        step()
    if not error:
        reached = [bool(layer.max_logits.isfinite().any()) for layer in clip.report().layers.values()]
        assert reached == [index not in dropped_here or index not in dropped_there for index in range(3)]
