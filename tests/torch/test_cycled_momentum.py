"""Schedulers that cycle momentum cycle it in both halves: Muon's momentum, and β₁ of AdamW."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from muonclip.torch import MuonClip

SCHEDULERS = {
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=12),
    "cyclic": lambda optimizer: CyclicLR(
        optimizer, base_lr=0.01, max_lr=0.1, step_size_up=3, base_momentum=0.5, max_momentum=0.7
    ),
}
BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1


def made():
    torch.manual_seed(0)
    vector, matrix = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(4, 6))
    groups = [dict(params=[matrix], use="muon"), dict(params=[vector], use="adamw", betas=BETAS)]
    return vector, matrix, MuonClip(groups, lr=0.01, weight_decay=DECAY, qk_clip=None)


def step(vector, matrix, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    for parameter in (vector, matrix):
        if parameter is not None:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_adamw_half_is_torchs_under_the_same_scheduler(kind):
    vector, matrix, optimizer = made()
    other = nn.Parameter(vector.detach().clone())
    torchs = torch.optim.AdamW([other], lr=0.01, betas=BETAS, eps=EPS, weight_decay=DECAY)
    schedulers = [SCHEDULERS[kind](each) for each in (optimizer, torchs)]
    seen = set()
    for number in range(10):
        step(vector, matrix, optimizer, number)
        step(other, None, torchs, number)
        seen.add((optimizer.param_groups[0]["momentum"], optimizer.param_groups[1]["betas"]))
        for scheduler in schedulers:
            scheduler.step()
        assert torch.equal(vector, other), number
    assert len(seen) > 4
    assert all(momentum == betas[0] and betas[1] == BETAS[1] for momentum, betas in seen)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_run_that_is_resumed_goes_on_to_the_bit(kind):
    vector, matrix, optimizer = made()
    scheduler = SCHEDULERS[kind](optimizer)
    for number in range(5):
        step(vector, matrix, optimizer, number)
        scheduler.step()
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict(), vector.data, matrix.data))
    again = made()
    resumed = SCHEDULERS[kind](again[2])
    again[2].load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    again[0].data, again[1].data = saved[2], saved[3]
    for number in range(5, 9):
        for (each, other, own), schedule in (((vector, matrix, optimizer), scheduler), (again, resumed)):
            step(each, other, own, number)
            schedule.step()
    assert torch.equal(vector, again[0])
    assert torch.equal(matrix, again[1])


def test_betas_of_a_group_that_nobody_cycles_are_its_own():
    vector, matrix, optimizer = made()
    optimizer.param_groups[1]["betas"] = (0.5, 0.6)
    step(vector, matrix, optimizer, 0)
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.6)
    OneCycleLR(optimizer, max_lr=0.1, total_steps=12, cycle_momentum=False)
    step(vector, matrix, optimizer, 1)
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.6)


def test_betas_that_are_set_between_two_steps_of_a_cycle_count_until_it_moves_on():
    vector, matrix, optimizer = made()
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=12)
    step(vector, matrix, optimizer, 0)
    optimizer.param_groups[1]["betas"] = (0.5, 0.6)
    step(vector, matrix, optimizer, 1)
    assert optimizer.param_groups[1]["betas"] == (0.5, 0.6)
    scheduler.step()
    step(vector, matrix, optimizer, 2)
    assert optimizer.param_groups[1]["betas"] == (optimizer.param_groups[0]["momentum"], 0.6)


def test_a_momentum_that_is_none_is_named_before_anything_moves():
    vector, matrix, optimizer = made()
    OneCycleLR(optimizer, max_lr=0.1, total_steps=12)
    optimizer.param_groups[1]["momentum"] = 1.5
    before = [copy.deepcopy(each) for each in (vector.data, matrix.data, optimizer.param_groups[1]["betas"])]
    with pytest.raises(ValueError, match=r"param_groups\[1\]: momentum=1\.5"):
        step(vector, matrix, optimizer, 0)
    assert torch.equal(before[0], vector)
    assert torch.equal(before[1], matrix)
    assert optimizer.param_groups[1]["betas"] == before[2]
