"""Heads that clips do not make quieter are found, after a few clips; others never are."""

import math

import pytest
import torch

from muonclip.core import clip_factors
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
