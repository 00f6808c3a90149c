"""Heads that clips do not make quieter are found, after a few clips; others never are."""

import math

import pytest
import torch
from torch import nn

from muonclip.core import clip_factors
from muonclip.torch import QKClip
from muonclip.torch.clip import errors as errors_module
from muonclip.torch.clip.stuck_heads import StuckHeads

TAU = 10.0


class Simulation:
    """Two attentions of two heads, of which the first head of the second does what `respond` says.

    `respond(S, γ, step)`: the maximum of the next step.
    """

    def __init__(self, respond, start=2 * TAU):
        self.stuck, self.respond, self.value, self.count = StuckHeads(), respond, start, 0

    def step(self, ran=True):
        maxima = torch.tensor([0.5, 1.1 * TAU if self.count % 2 else 0.9 * TAU, self.value, TAU])
        if not ran:
            maxima[2] = -math.inf
        gamma = clip_factors(maxima, TAU, xp=torch).gamma
        self.stuck.note(("a", "b"), (2, 2), maxima, gamma)
        if ran:
            self.value = self.respond(self.value, float(gamma[2]), self.count)
        self.count += 1

    def found(self, steps, **options):
        """The steps, from 1, at which something was found."""
        at = []
        for _ in range(steps):
            self.step()
            names = self.stuck.take(wait=True, **options)
            assert names in ((), ("b",))
            at += [self.count] if names else []
        return at


@pytest.mark.parametrize("growth", [1.0, 1.02, 0.99])
@pytest.mark.parametrize("start", [1.3, 4.0, 40.0])
def test_a_head_whose_weights_do_not_reach_its_logits_is_found_at_the_fourth_clip(start, growth):
    assert Simulation(lambda s, gamma, step: s * growth, start * TAU).found(5) == [4]


def test_a_head_that_doubles_is_found_and_then_less_and_less_often():
    assert Simulation(lambda s, gamma, step: 2 * s * gamma).found(400) == [4, 16, 64, 256]


@pytest.mark.parametrize("growth", [0.97, 1.0, 1.01, 1.1])
@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_a_head_that_is_clipped_as_usual_is_never_found(growth, spread):
    """It grows a little in each step, and its maximum differs from batch to batch."""
    generator = torch.Generator().manual_seed(0)

    def respond(s, gamma, step):
        nonlocal weight
        weight *= gamma * growth
        return weight * math.exp(spread * float(torch.randn((), generator=generator)))

    weight = 3 * TAU
    assert Simulation(respond, weight).found(1000) == []


def test_one_clip_that_works_begins_the_row_anew():
    assert Simulation(lambda s, gamma, step: s * gamma if step % 3 == 2 else 2 * TAU).found(30) == []


def test_steps_that_do_not_reach_a_head_say_nothing():
    run = Simulation(lambda s, gamma, step: s)
    for step in range(9):
        run.step(ran=step % 2 == 0)
        assert run.stuck.take(wait=True) == (("b",) if step == 6 else ())


def test_loaded_weights_and_other_attentions_begin_anew():
    run = Simulation(lambda s, gamma, step: s)
    assert run.found(3) == []
    run.stuck.reset()
    assert run.found(3) == []
    maxima, gamma = torch.full((6,), 2 * TAU), torch.full((6,), 0.5)
    for _ in range(3):
        run.stuck.note(("a", "b", "c"), (2, 2, 2), maxima, gamma)
    assert run.stuck.take(wait=True) == ()
    run.stuck.note(("a", "b", "c"), (2, 2, 2), maxima, gamma)
    assert run.stuck.take(wait=True) == ("a", "b", "c")


def test_an_accelerator_is_not_waited_for(monkeypatch):
    copies = []
    monkeypatch.setattr(errors_module, "copy_to_host", lambda host, device: copies.append((host, device.clone())))
    run = Simulation(lambda s, gamma, step: s)
    for _ in range(4):
        run.step()
    assert run.stuck.take(wait=False) == ()
    for host, device in copies:
        host.copy_(device)
    assert run.stuck.take(wait=False) == ("b",)
    assert run.stuck.take(wait=False) == ()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 12, bias=False) for _ in range(3))
        self.normalised = False

    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (2, 6)).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.normalised:
            q, k = (9 * t / t.norm(dim=-1, keepdim=True).detach() for t in (q, k))
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_a_change_of_the_model_that_keeps_the_clip_from_its_logits_is_an_error_by_name():
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(), nn.Linear(6, 2)), torch.randn(2, 5, 6)
    clip = QKClip(model, tau=0.1, example_inputs=x)
    model(x)
    clip.step()
    model[0].normalised = True

    def steps():
        for _ in range(6):
            model(x)
            clip.step()

    with pytest.raises(RuntimeError, match="0 was clipped several times, and its logits did not follow"):
        steps()


def test_a_head_that_grows_in_every_step_is_proven_again_and_clipped_on():
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(), nn.Linear(6, 2)), torch.randn(2, 5, 6)
    clip = QKClip(model, tau=0.5, example_inputs=x)
    monitor, asked = clip.attentions._monitor, []
    prove_again = monitor.prove_again
    monitor.prove_again = lambda names: asked.append(tuple(names)) or prove_again(names)
    for _ in range(12):
        model(x)
        clip.step()
        with torch.no_grad():
            model[0].q.weight.mul_(4)
    assert 1 <= asked.count(("0",)) == len(asked) <= 2  # each head once
    assert clip.report().clipped_heads == 2


def test_attention_that_could_be_clipped_in_another_way_is_clipped_on():
    """The first layer shows how all of its make are clipped: by the queries, since its keys feed a gate."""

    class Gated(Attention):
        def __init__(self, *, gate):
            super().__init__()
            self.gate, self.o = gate, nn.Linear(12, 6)

        def forward(self, x):
            y = super().forward(x).transpose(1, 2).flatten(2)
            return x + self.o(y * torch.sigmoid(self.k(x)) if self.gate else y)

    torch.manual_seed(0)
    model, x = nn.Sequential(Gated(gate=True), Gated(gate=False)), torch.randn(2, 5, 6)
    clip = QKClip(model, tau=0.5, example_inputs=x)
    keys = model[0].k.weight.detach().clone()
    for _ in range(12):
        model(x)
        clip.step()
        with torch.no_grad():
            model[1].q.weight.mul_(8)
            model[0].q.weight.mul_(8)
    assert clip.report().clipped_heads == 4
    assert torch.equal(model[0].k.weight, keys)
